"""`oreal train`: start the engine and the models, run `loop.train`, leave the policy as a Hugging Face folder."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from oreal_megatron import loop
from oreal_megatron.config import Config
from oreal_megatron.config.user_functions import Origin
from oreal_megatron.data import sampler
from oreal_megatron.evaluation import score
from oreal_megatron.mcore import checkpoint_state, gpt_model, parallel
from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver
from oreal_megatron.observe import run_report, speed_report
from oreal_megatron.observe.recorder import Recorder
from oreal_megatron.observe.run_folder import NO_ORIGIN, model_note
from oreal_megatron.plan import gpus
from oreal_megatron.protocols import Dataset, GrowingEngine, Metrics, RoundVerifier, Verifier
from oreal_megatron.runtime import distributed, files, heartbeat
from oreal_megatron.runtime.preemption import StopRequest
from oreal_megatron.session import policy_weights
from oreal_megatron.session.inputs import read_inputs
from oreal_megatron.session.models import build_models, saved_names
from oreal_megatron.session.session import Session
from oreal_megatron.training.hooks import TrainingHooks
from oreal_megatron.training.resume import AUTO, Start
from oreal_megatron.verify.penalised_verifier import PenalisedVerifier

if TYPE_CHECKING:
    from oreal_megatron.rollout.engine import VllmEngine
    from oreal_megatron.rollout.rollout_pool import RolloutPool

log = logging.getLogger(__name__)
UNREAD = ("reward_training.", "supervised.")  # sections of other commands


def train(
    config: Config, resume: str | None, step: int | None, stop_request: StopRequest, origin: Origin = NO_ORIGIN
) -> None:
    """Train the policy of a recipe into its run folder; `resume` and `step` as on the command line. Collective.

    All input is read and checked before anything is loaded: ConfigError. RunStopped: see exit codes 3 and 4.
    """
    inputs = read_inputs(config)
    prompts = inputs.training_prompts()
    dataset = sampler.balanced(prompts, config.data, config.seed)
    held_out = inputs.held_out()
    gpt_model.transformer_config(inputs.arch, config)  # raises for what Megatron would refuse after loading
    run_path, folder = Path(config.run), Path(config.run) / "checkpoints"
    start = Start(config, config.steps, resume, step, inputs.fingerprints(prompts), unread=UNREAD)
    start.check()
    files.make_folder(run_path, "run")
    with Session(config) as session:
        session.lock(run_path)
        start.check_and_announce()  # again, because another writer may have ended meanwhile
        names = saved_names(config)
        checkpoint = checkpoint_state.choose(folder, names, step, resume == AUTO) if resume else None
        engine, verifier = session.start_engine(inputs, stop_request)
        session.start_megatron()
        policy, reference, reward_model, saved_models = build_models(inputs)
        weight_sync = policy_weights.connect(policy, engine)
        first_step = checkpoint_state.load(checkpoint, saved_models) if checkpoint else 0
        start.set_aside_later_steps(first_step)
        pool = _start_pool(config, dataset, engine, verifier, checkpoint, first_step)
        peak_flops, share = _peak_flops(config), parallel.replica_share()
        generation_metrics = partial(_generation_metrics, engine, pool)
        run = Recorder(
            config, first_step, start.fingerprints, share, inputs.arch, peak_flops, origin, generation_metrics
        )
        saver = CheckpointSaver(
            folder,
            saved_models,
            config.checkpoint.keep,
            config.checkpoint.keep_every,
            describe=partial(policy_weights.describe, inputs),
            attachments=pool.attachments if pool else dict,
        )
        evaluate = partial(score.evaluate, held_out, engine, verifier, config) if held_out else None
        save_policy = partial(policy_weights.save_model, inputs, "policy", policy)
        hooks = TrainingHooks(
            config,
            saver,
            run,
            evaluate,
            stop_request,
            save_policy,
            run_path / "best",
            config.evaluation.figure,
            sleep_engine=engine.sleep,
            wake_engine=lambda: weight_sync.sync(policy.updates),
        )
        packing_spec = parallel.packing_spec(config.tokens_per_micro_batch, inputs.arch)
        models = (policy, reference, reward_model)
        grader: Verifier = pool or verifier
        if config.selection.penalties.enabled:
            grader = PenalisedVerifier(grader, config.selection.penalties, reference, packing_spec)
        with hooks.saving_on_stop_request():
            weight_sync.sync(policy.updates)
            hooks.start(first_step, saved=checkpoint is not None)
            loop.train(config, pool or dataset, pool or engine, grader, *models, weight_sync, run, hooks, packing_spec)
        with heartbeat.phase("checkpoint"):
            saver.finish()
            save_policy(run_path / "policy", model_note(config.steps))
        if held_out and not (run_path / "best").is_dir():
            log.info(f"no evaluation was better than the starting policy's, so there is no {run_path / 'best'}")
        _print_results(run_path)


def _print_results(run: Path) -> None:
    """Print speed and accuracy of a finished run, on the first rank."""
    if distributed.rank() == 0:
        record = run_report.read_run(run)
        speed_report.write_and_print(record)
        print(run_report.closing(record))


def _start_pool(
    config: Config,
    dataset: Dataset,
    engine: GrowingEngine,
    verifier: RoundVerifier,
    checkpoint: Path | None,
    first_step: int,
) -> RolloutPool | None:
    """Return the pool of prompts in flight, as it was in the checkpoint; None where steps do not overlap."""
    if not config.rollout.enabled:
        return None
    from oreal_megatron.rollout.rollout_pool import RolloutPool  # its package sets variables of the environment

    pool = RolloutPool(config, dataset, engine, verifier)
    pool.restore(checkpoint, first_step)
    return pool


def _generation_metrics(engine: VllmEngine, pool: RolloutPool | None) -> Metrics:
    """Return the metrics of the last step's generation. Collective."""
    return engine.metrics() | (pool.metrics() if pool else {})


def _peak_flops(config: Config) -> float | None:
    """Return the peak operations per second of this rank's GPU if its data sheet is known (plan/gpus.py)."""
    return gpus.peak_flops(torch.cuda.get_device_name(), config.model.dtype) if torch.cuda.is_available() else None
