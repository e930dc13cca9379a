"""`oreal reward-model`: train the reward model on rollouts with verdicts, before reinforcement learning."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from oreal_megatron.algo import guard, packing, reward_diagnostics
from oreal_megatron.config import Config, ConfigError
from oreal_megatron.config.user_functions import Origin
from oreal_megatron.data import chat_template, labelled_rollouts
from oreal_megatron.data.labelled_rollouts import LabelledRollouts, PairSampler
from oreal_megatron.mcore import checkpoint_state, gpt_model, parallel
from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver
from oreal_megatron.observe.progress import Bar
from oreal_megatron.observe.recorder import Recorder
from oreal_megatron.observe.run_folder import NO_ORIGIN
from oreal_megatron.protocols import Metrics, RewardModelTrainer
from oreal_megatron.records import Batch, PackingSpec, Sample, ScoredRollout
from oreal_megatron.runtime import distributed, heartbeat
from oreal_megatron.runtime.preemption import StopRequest
from oreal_megatron.session import policy_weights
from oreal_megatron.session.inputs import Inputs, read_inputs
from oreal_megatron.session.models import build_reward_model
from oreal_megatron.session.session import Session
from oreal_megatron.training.hooks import TrainingHooks
from oreal_megatron.training.resume import AUTO, Start

log = logging.getLogger(__name__)
FIGURE = "auc"  # of the held-out rollouts; the weights that have it highest are kept
FOLDER = "reward_model"  # of the run, in which they are


class RolloutScorer(Protocol):
    """A reward model that scores rollouts."""

    def scored_rollouts(self, batch: Batch) -> tuple[ScoredRollout, ...]:
        """Return the rollouts of the batch on all ranks with their mean scores. Collective."""
        ...


class Pairs(Protocol):
    """Samples in the order in which the run visits them."""

    def take(self, step: int) -> list[Sample]:
        """Return the samples of a step, counted from 0."""
        ...


class Steps(Protocol):
    """Work between two steps."""

    def after_step(self, steps_done: int) -> None:
        """Run what is due after `steps_done` steps. Collective."""
        ...


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """Held-out AUC before training and at its best, and the step of the latter."""

    steps: int  # taken
    start: float
    best: float
    best_step: int


def train_reward_model(
    config: Config, resume: str | None, step: int | None, stop: StopRequest, origin: Origin = NO_ORIGIN
) -> TrainingResult:
    """Train the reward model of a recipe into RUN/reward_model; arguments as of `oreal train`. Collective."""
    inputs = read_inputs(with_training_settings(config))
    training = config.reward_training
    if not training.path:
        raise ConfigError(
            "reward_training.path names no rollouts; sample and grade some with "
            "`oreal evaluate RECIPE --rate OUT.jsonl` and set it to the file of responses in OUT.jsonl.answers"
        )
    positions = inputs.arch.max_positions
    rollouts = labelled_rollouts.load(training.path, inputs.tokenizer, prompt_renderer(inputs), positions)
    prompts, held_out = labelled_rollouts.split(rollouts.prompts, training.held_out_share, config.seed)
    gpt_model.transformer_config(inputs.arch, config)  # raises for what Megatron would refuse after loading
    run_path, folder = Path(config.run), Path(config.run) / "checkpoints"
    fingerprints = inputs.fingerprints() | {"reward_training.path": labelled_rollouts.digest(training.path)}
    start = Start(config, training.steps, resume, step, fingerprints)
    start.check()
    with Session(config) as session:
        session.lock(run_path)
        start.check_and_announce()  # again, because another writer may have ended meanwhile
        checkpoint = checkpoint_state.choose(folder, ["reward_model"], step, resume == AUTO) if resume else None
        session.start_megatron()
        if distributed.rank() == 0:
            _describe(rollouts, len(prompts), len(held_out))
        reward_model = build_reward_model(inputs)
        saved_models = {"reward_model": reward_model}
        first_step = checkpoint_state.load(checkpoint, saved_models) if checkpoint else 0
        start.set_aside_later_steps(first_step)
        run = Recorder(config, first_step, fingerprints, parallel.replica_share(), inputs.arch, origin=origin)
        retention = (config.checkpoint.keep, config.checkpoint.keep_every)
        saver = CheckpointSaver(folder, saved_models, *retention, describe=partial(policy_weights.describe, inputs))
        spec = parallel.packing_spec(config.tokens_per_micro_batch, inputs.arch)
        samples = [sample for prompt in held_out for sample in (*prompt.correct, *prompt.incorrect)]
        evaluate = partial(held_out_figures, reward_model, packing.batch(samples, spec))
        save_model = partial(policy_weights.save_model, inputs, "reward_model", reward_model)
        best = run_path / FOLDER
        hooks = TrainingHooks(
            inputs.config, saver, run, evaluate, stop, save_model, best, FIGURE, command="oreal reward-model"
        )
        with hooks.saving_on_stop_request():
            hooks.start(first_step, saved=checkpoint is not None)
            pairs = PairSampler(prompts, training.pairs_per_step, config.seed)
            steps = learn(config, pairs, reward_model, run, hooks, spec)
        with heartbeat.phase("checkpoint"):
            saver.finish()
        return TrainingResult(steps, *run.metrics.first_and_best(FIGURE))


def prompt_renderer(inputs: Inputs) -> Callable[[str], tuple[int, ...]]:
    """Return a function from a question to the tokens of its prompt: those of the data file where it is in there.

    A problem may have a system message of its own there, which the lines of rollouts do not repeat.
    """
    data = inputs.config.data
    known = {prompt.question: prompt.tokens for prompt in inputs.rendered(data.path)} if data.path else {}

    def render(question: str) -> tuple[int, ...]:
        return known.get(question) or chat_template.render(
            inputs.tokenizer, question, data.system_prompt, inputs.template
        )

    return render


def with_training_settings(config: Config) -> Config:
    """Return the configuration with steps, evaluations and optimizer of the reward model's own training."""
    training = config.reward_training
    return dataclasses.replace(
        config,
        steps=training.steps,
        policy_freeze_steps=0,
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=0),
        reward_model=dataclasses.replace(config.reward_model, enabled=True, optimizer=training.optimizer),
        evaluation=dataclasses.replace(config.evaluation, every=training.evaluate_every),
    )


def learn(
    config: Config,
    pairs: Pairs,
    reward_model: RewardModelTrainer,
    run: Recorder,
    hooks: Steps,
    spec: PackingSpec,
) -> int:
    """Train until the last step or the early stop; return the number of steps taken. Collective."""
    training = config.reward_training
    with Bar("reward model", training.steps, distributed.rank() == 0, run.first_step) as bar:
        run.timer.start()
        for step in range(run.first_step, training.steps):
            if training.patience and run.metrics.evaluations_since_best(FIGURE) >= training.patience:
                return step
            heartbeat.step(step)
            with run.phase("reward_model"):
                token_weights, metrics = reward_model.update(packing.batch(pairs.take(step), spec))
            if token_weights.rollouts:
                run.metrics.log_calibration(step, reward_diagnostics.calibration(token_weights.rollouts))
            guard.check(metrics, config.guard, step)
            run.metrics.log_step(step, metrics | run.timer.finish_step(metrics, []))
            hooks.after_step(step + 1)
            auc = f", AUC {metrics['reward_model/auc']:.3f}" if "reward_model/auc" in metrics else ""
            bar.advance(1, f"loss {metrics['loss/reward_model']:.3f}{auc}")
    return training.steps


def held_out_figures(reward_model: RolloutScorer, batch: Batch) -> Metrics:
    """Return AUC, comparison within prompts and number of the held-out rollouts. Collective."""
    rollouts = reward_model.scored_rollouts(batch)
    figures = {name.split("/")[1]: value for name, value in reward_diagnostics.metrics(rollouts).items()}
    return {**figures, "rollouts": len(rollouts)}


def _describe(rollouts: LabelledRollouts, training: int, held_out: int) -> None:
    log.info("%d rollouts; %d prompts to train on, %d held out", rollouts.rollouts, training, held_out)
    if rollouts.too_long:
        log.warning("%d rollouts are left out: they are longer than the model's positions", rollouts.too_long)
    if rollouts.retokenised:
        share = rollouts.retokenised / max(rollouts.rollouts, 1)
        log.warning("%.1f %% of the responses tokenise to another length than was sampled", 100 * share)
