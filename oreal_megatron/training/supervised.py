"""`oreal sft`: supervised fine-tuning on demonstrations, before reinforcement learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from oreal_megatron.algo import guard, packing
from oreal_megatron.config import Config, ConfigError
from oreal_megatron.config.user_functions import Origin
from oreal_megatron.data import problems
from oreal_megatron.data.sampler import Sampler
from oreal_megatron.evaluation import score
from oreal_megatron.observe.progress import Bar
from oreal_megatron.observe.rows import append_row
from oreal_megatron.observe.run_folder import NO_ORIGIN, RunFolder, model_note, refuse_existing
from oreal_megatron.protocols import Metrics
from oreal_megatron.records import Batch, PackingSpec, Prompt, Sample
from oreal_megatron.runtime import distributed, files, heartbeat
from oreal_megatron.session import policy_weights
from oreal_megatron.session.inputs import Inputs, read_inputs
from oreal_megatron.session.session import Session

if TYPE_CHECKING:
    from oreal_megatron.mcore import trained_models
    from oreal_megatron.rollout.engine import VllmEngine
    from oreal_megatron.verify.step_verifier import StepVerifier


class Demonstrations(Protocol):
    """Demonstrations in the order in which the run visits them."""

    def take(self, step: int) -> list[Sample]:
        """Return the samples of a step, counted from 0."""
        ...


class ImitationTrainer(Protocol):
    """The policy, trained by cross entropy."""

    def imitate(self, batch: Batch) -> Metrics:
        """Take one step on demonstrations."""
        ...


def fine_tune(config: Config, origin: Origin = NO_ORIGIN) -> int:
    """Fine-tune the policy of a recipe into RUN/policy; return the steps taken. Collective."""
    inputs = read_inputs(config)
    demonstrations = problems.load_demonstrations(
        config.supervised.path,
        inputs.tokenizer,
        config.data.system_prompt,
        inputs.arch.max_positions,
        config.data.keys,
    )
    held_out = inputs.held_out() if config.supervised.evaluate_every else []
    if config.supervised.evaluate_every and not held_out:
        raise ConfigError("supervised.evaluate_every is set, but data.held_out names no problems to evaluate on")
    refuse_existing(config)
    files.make_folder(Path(config.run), "run")
    sampler = Sampler(demonstrations, config.supervised.samples_per_step, config.seed)
    return _run(inputs, sampler, held_out, origin)


def _run(inputs: Inputs, demonstrations: Demonstrations, held_out: list[Prompt], origin: Origin) -> int:
    from oreal_megatron.mcore import gpt_model, parallel, trained_models  # imports Megatron, which takes seconds

    config = inputs.config
    gpt_model.transformer_config(inputs.arch, config)  # raises for what Megatron would refuse after loading
    with Session(config) as session:
        session.lock(Path(config.run))
        refuse_existing(config)  # again: another writer may have ended meanwhile
        engine_and_verifier = session.start_engine(inputs) if held_out else None
        session.start_megatron()
        # Demonstrations were not sampled from the policy: their likelihood is that of its own logits.
        plain = dataclasses.replace(config.sampling, temperature=1.0)
        imitating = dataclasses.replace(config, optimizer=config.supervised.optimizer, sampling=plain)
        policy = trained_models.Policy(inputs.arch, imitating, inputs.folder.tensor)
        accuracy = _held_out_accuracy(config, policy, *engine_and_verifier, held_out) if engine_and_verifier else None
        if distributed.rank() == 0:
            RunFolder(config).write_header(inputs.fingerprints(), origin=origin)
        spec = parallel.packing_spec(config.tokens_per_micro_batch, inputs.arch)
        steps = imitate(config, demonstrations, policy, accuracy, _log_to(Path(config.run)), spec)
        with heartbeat.phase("checkpoint"):
            policy_weights.save_model(inputs, "policy", policy, Path(config.run) / "policy", model_note(steps))
    return steps


def _held_out_accuracy(
    config: Config, policy: trained_models.Policy, engine: VllmEngine, verifier: StepVerifier, held_out: list[Prompt]
) -> Callable[[], float]:
    """Return a function that measures the greedy accuracy of the policy's present weights. Collective."""
    weight_sync = policy_weights.connect(policy, engine)

    def accuracy() -> float:
        weight_sync.sync(policy.updates)
        result = score.evaluate(held_out, engine, verifier, config)
        engine.sleep()
        return result["accuracy"]

    return accuracy


def imitate(
    config: Config,
    demonstrations: Demonstrations,
    policy: ImitationTrainer,
    accuracy: Callable[[], float] | None,  # greedy, on held-out problems, of the present weights
    log: Callable[[int, Metrics], None],
    packing_spec: PackingSpec,
) -> int:
    """Train for `supervised.steps`, or until the held-out accuracy is reached; return the steps taken. Collective."""
    supervised = config.supervised
    with Bar("sft", supervised.steps, distributed.rank() == 0) as bar:
        for step in range(supervised.steps):
            heartbeat.step(step)
            batch = packing.batch(demonstrations.take(step), packing_spec)
            metrics = policy.imitate(batch)
            guard.check(metrics, config.guard, step)
            log(step, metrics)
            note = f"loss {metrics['loss/total']:.3f}"
            if accuracy and (step + 1) % supervised.evaluate_every == 0:
                held_out_accuracy = accuracy()
                note += f", held-out accuracy {held_out_accuracy:.3f}"
                if held_out_accuracy >= supervised.stop_at_accuracy:
                    bar.advance(1, note)
                    return step + 1
            bar.advance(1, note)
    return supervised.steps


def _log_to(run: Path) -> Callable[[int, Metrics], None]:
    """Append metrics to the run folder, on the first rank."""

    def log(step: int, metrics: Metrics) -> None:
        if distributed.rank() == 0:
            append_row(run / "metrics.jsonl", {"step": step, **metrics})

    return log
