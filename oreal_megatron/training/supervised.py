"""`oreal sft`: supervised fine-tuning on demonstrations, before reinforcement learning.

Checkpoints, evaluations and resumes are those of `oreal train`: the order of the demonstrations and the learning rates
are functions of the step and the seed, so that a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from oreal_megatron.algo import guard, packing
from oreal_megatron.config import Config, ConfigError
from oreal_megatron.config.user_functions import Origin
from oreal_megatron.data import demonstration_lines, lines
from oreal_megatron.data.sampler import Sampler
from oreal_megatron.evaluation import score
from oreal_megatron.observe.progress import Bar
from oreal_megatron.observe.recorder import Recorder
from oreal_megatron.observe.run_folder import NO_ORIGIN, model_note
from oreal_megatron.protocols import Metrics, TokenValues
from oreal_megatron.records import Batch, PackingSpec, Prompt, Sample
from oreal_megatron.runtime import distributed, files, heartbeat
from oreal_megatron.runtime.preemption import StopRequest
from oreal_megatron.session import policy_weights
from oreal_megatron.session.inputs import Inputs, read_inputs
from oreal_megatron.session.session import Session
from oreal_megatron.training.hooks import TrainingHooks, is_due
from oreal_megatron.training.resume import AUTO, Start

if TYPE_CHECKING:
    from oreal_megatron.mcore import trained_models
    from oreal_megatron.rollout.engine import VllmEngine
    from oreal_megatron.verify.step_verifier import StepVerifier

FIGURE = "accuracy"  # of an evaluation, which supervised.stop_at_accuracy is compared with


class Demonstrations(Protocol):
    """Demonstrations in the order in which the run visits them."""

    def take(self, step: int) -> list[Sample]:
        """Return the samples of a step, counted from 0."""
        ...


class ImitationTrainer(Protocol):
    """The policy, trained by cross entropy."""

    def imitate(self, batch: Batch) -> tuple[TokenValues, Metrics]:
        """Take one step on demonstrations; return the tokens' log-probs of before the step, and metrics."""
        ...


class StepWork(Protocol):
    """Work between two steps."""

    def after_step(self, steps_done: int) -> None:
        """Run what is due after `steps_done` steps. Collective."""
        ...


class CrossEntropy:
    """Cross entropy on demonstrations: the method of `oreal sft`."""

    command = "oreal sft"
    unread: tuple[str, ...] = ("reward_training.", "distillation.")  # sections, each with its dot

    def check(self, inputs: Inputs) -> dict[str, str]:
        """Return digests of further inputs. Raises ConfigError."""
        return {}

    def build(self, inputs: Inputs) -> trained_models.Policy:
        """Build the policy on this rank. Collective."""
        from oreal_megatron.mcore import trained_models  # imports Megatron, which takes seconds

        return trained_models.Policy(inputs.arch, inputs.config, inputs.folder.tensor)


def fine_tune(
    config: Config,
    resume: str | None,
    step: int | None,
    stop_request: StopRequest,
    origin: Origin = NO_ORIGIN,
    method: CrossEntropy | None = None,
) -> int:
    """Fine-tune the policy of a recipe into RUN/policy; arguments as of `oreal train`. Collective.

    Returns the steps that the entire run has taken.
    """
    method = method or CrossEntropy()
    inputs = read_inputs(with_supervised_settings(config))
    further = method.check(inputs)
    demonstrations = demonstration_lines.load_demonstrations(
        config.supervised.path,
        inputs.tokenizer,
        config.data.system_prompt,
        inputs.arch.max_positions,
        config.data.keys,
        inputs.template,
    )
    held_out = inputs.held_out() if config.supervised.evaluate_every else []
    if config.supervised.evaluate_every and not held_out:
        raise ConfigError("supervised.evaluate_every is set, but data.held_out names no problems to evaluate on")
    demonstrated = {"supervised.path": files.digest([lines.local_file(config.supervised.path)])}
    digests = inputs.fingerprints() | demonstrated | further
    start = Start(config, config.supervised.steps, resume, step, digests, unread=method.unread)
    start.check()
    files.make_folder(Path(config.run), "run")
    sampler = Sampler(demonstrations, config.supervised.samples_per_step, config.seed)
    return _run(inputs, start, method, sampler, held_out, stop_request, origin)


def with_supervised_settings(config: Config) -> Config:
    """Return the configuration with steps, optimizer, evaluations and checkpoints of supervised fine-tuning.

    Demonstrations were not sampled from the policy: their likelihood is that of its own logits, at temperature 1.
    """
    supervised = config.supervised
    return dataclasses.replace(
        config,
        steps=supervised.steps,
        policy_freeze_steps=0,
        optimizer=supervised.optimizer,
        reward_model=dataclasses.replace(config.reward_model, enabled=False),
        weights=dataclasses.replace(config.weights, shuffle=False),
        sampling=dataclasses.replace(config.sampling, temperature=1.0),
        evaluation=dataclasses.replace(config.evaluation, every=supervised.evaluate_every),
        checkpoint=dataclasses.replace(config.checkpoint, every=supervised.checkpoint_every),
    )


def _run(
    inputs: Inputs,
    start: Start,
    method: CrossEntropy,
    demonstrations: Demonstrations,
    held_out: list[Prompt],
    stop_request: StopRequest,
    origin: Origin,
) -> int:
    # These import Megatron, which takes seconds.
    from oreal_megatron.mcore import checkpoint_state, gpt_model, parallel
    from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver

    config, run_path = inputs.config, start.run
    gpt_model.transformer_config(inputs.arch, config)  # raises for what Megatron would refuse after loading
    with Session(config) as session:
        session.lock(run_path)
        start.check_and_announce()  # again: another writer may have ended meanwhile
        folder, skip_damaged = run_path / "checkpoints", start.resume == AUTO
        checkpoint = checkpoint_state.choose(folder, ["policy"], start.step, skip_damaged) if start.resume else None
        engine_and_verifier = session.start_engine(inputs, stop_request) if held_out else None
        session.start_megatron()
        policy = method.build(inputs)
        first_step = checkpoint_state.load(checkpoint, {"policy": policy}) if checkpoint else 0
        start.set_aside_later_steps(first_step)
        evaluate = _held_out_evaluation(config, policy, *engine_and_verifier, held_out) if engine_and_verifier else None
        share = parallel.replica_share()
        run = Recorder(start.config, first_step, start.fingerprints, share, inputs.arch, origin=origin)
        retention = (config.checkpoint.keep, config.checkpoint.keep_every)
        describe = partial(policy_weights.describe, inputs)
        saver = CheckpointSaver(folder, {"policy": policy}, *retention, describe=describe)
        save_policy = partial(policy_weights.save_model, inputs, "policy", policy)
        hooks = TrainingHooks(
            config, saver, run, evaluate, stop_request, save_policy, best=None, command=method.command
        )
        spec = parallel.packing_spec(config.tokens_per_micro_batch, inputs.arch)
        with hooks.saving_on_stop_request():
            hooks.start(first_step, saved=checkpoint is not None)
            steps = imitate(config, demonstrations, policy, run, hooks, spec)
        with heartbeat.phase("checkpoint"):
            saver.finish()
            save_policy(run_path / "policy", model_note(steps))
    return steps


def _held_out_evaluation(
    config: Config, policy: trained_models.Policy, engine: VllmEngine, verifier: StepVerifier, held_out: list[Prompt]
) -> Callable[[], Metrics]:
    """Return a function that evaluates the policy's present weights, after which the engine sleeps. Collective."""
    weight_sync = policy_weights.connect(policy, engine)

    def evaluate() -> Metrics:
        weight_sync.sync(policy.updates)
        result = score.evaluate(held_out, engine, verifier, config)
        engine.sleep()
        return result

    return evaluate


def imitate(
    config: Config,
    demonstrations: Demonstrations,
    policy: ImitationTrainer,
    run: Recorder,
    hooks: StepWork,
    packing_spec: PackingSpec,
) -> int:
    """Train until the last step, or until the held-out accuracy is reached; return the number of steps. Collective."""
    supervised, highest = config.supervised, math.nan  # accuracy of the evaluations
    with Bar("sft", supervised.steps, distributed.rank() == 0, run.first_step) as bar:
        run.timer.start()
        for step in range(run.first_step, supervised.steps):
            if is_due(step, supervised.evaluate_every, supervised.steps):
                highest = run.metrics.first_and_best(FIGURE)[1]
                if highest >= supervised.stop_at_accuracy:
                    return step
            heartbeat.step(step)
            with run.phase("policy"):
                batch = packing.batch(demonstrations.take(step), packing_spec)
                logp, metrics = policy.imitate(batch)
            run.dump_demonstrations(step, batch, logp, metrics)
            guard.check(metrics, config.guard, step)
            run.metrics.log_step(step, metrics | run.timer.finish_step(metrics, []))
            hooks.after_step(step + 1)
            accuracy = "" if math.isnan(highest) else f", highest held-out accuracy {highest:.3f}"
            bar.advance(1, f"loss {metrics['loss/total']:.3f}{accuracy}")
    return supervised.steps
