"""`oreal train RECIPE`: build the pieces, call the loop, leave the policy as a Hugging Face folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from oreal_megatron import loop, settings
from oreal_megatron.config import Config, ConfigError
from oreal_megatron.convert import to_hf
from oreal_megatron.data import sampler
from oreal_megatron.evaluation import score
from oreal_megatron.observe import run_report, speed_report
from oreal_megatron.observe.recorder import Recorder
from oreal_megatron.observe.run_folder import refuse_changed, refuse_existing
from oreal_megatron.plan import gpus
from oreal_megatron.runtime import checkpoint_folders, distributed, files, heartbeat, preemption, watchdog
from oreal_megatron.session import prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="path/to/file.py:function, a function that returns a Config")
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with this run folder from its newest checkpoint; with a recipe, `auto`: go on with the recipe's "
        "run folder from its newest sound checkpoint, or begin where there is none",
    )
    parser.add_argument("--step", type=int, metavar="N", help="resume from the checkpoint after N steps instead")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. loss.kl_coef=0.02")


def run(args: argparse.Namespace) -> int:
    leave = preemption.Notice().listen()
    config = _config(args)
    inputs = prepare.prepare(config)
    prompts = sampler.balanced(inputs.prompts(config.data.path), config.data, config.seed)
    held_out = inputs.held_out()

    from oreal_megatron.mcore import checkpoint_state, gpt_model, parallel, trained_models
    from oreal_megatron.mcore.checkpoint_saver import Saver
    from oreal_megatron.training.hooks import TrainingHooks  # imports Megatron, which takes seconds

    folder, trained = Path(config.run) / "checkpoints", ["policy"] + ["reward_model"] * config.reward_model.enabled
    gpt_model.transformer_config(inputs.arch, config)  # refuses what Megatron would, before anything is loaded
    inputs_read = inputs.fingerprints()
    _check_resumable(args.resume, folder, inputs_read)

    parallel.start_process_group(config.watchdog.collective_s)
    watchdog.start(config)
    resumed = checkpoint_state.choose(folder, trained, args.step, args.resume == "auto") if args.resume else None
    engine, verifier = prepare.start_engine(inputs, leave.__bool__)
    engine.sleep()  # the models are built in its room
    parallel.start_megatron(config.parallel, config.seed, config.watchdog.collective_s)
    pieces = (inputs.arch, config, inputs.folder.tensor)
    policy, reference = trained_models.Policy(*pieces), trained_models.Reference(*pieces)
    reward_model = (
        trained_models.TokenRewardModel(*pieces) if config.reward_model.enabled else trained_models.NoRewardModel()
    )
    trainers = dict(zip(trained, (policy, reward_model), strict=False))
    weight_sync = prepare.connect(policy, engine)
    first = checkpoint_state.load(resumed, trainers) if resumed else 0
    record = Recorder(config, first, inputs_read, parallel.share(), inputs.arch, _peak(config))
    kept = (config.checkpoint.keep, config.checkpoint.keep_every)
    saver = Saver(folder, trainers, *kept, describe=partial(prepare.describe, inputs))
    keep_best = partial(save_policy, inputs, policy, Path(config.run) / "best")
    evaluate = partial(score.evaluate, held_out, engine, verifier, config) if held_out else None
    between_steps = TrainingHooks(config, saver, record, evaluate, leave, keep_best)
    spec = parallel.packing_spec(config.tokens_per_micro_batch, inputs.arch)
    models = (policy, reference, reward_model)
    with between_steps.saving_when_asked_to_leave():
        weight_sync.sync(policy.updates)
        between_steps.begin(first, saved=resumed is not None)
        loop.train(config, prompts, engine, verifier, *models, weight_sync, record, between_steps, spec)
    with heartbeat.phase("checkpoint"):
        saver.finish()
        save_policy(inputs, policy, Path(config.run) / "policy")
    if distributed.rank() == 0:
        speed_report.write_and_print(run_report.read_run(Path(config.run)))
    verifier.grader.close()
    with heartbeat.phase("stop"):
        parallel.stop(engine)
    return 0


def _check_resumable(resume: str | None, folder: Path, inputs_read: dict[str, str]) -> None:
    found = checkpoint_folders.complete(folder)
    if resume and resume != "auto" and not found:
        raise ConfigError(f"{folder} holds no finished checkpoint to resume from")
    if found:
        refuse_changed(folder.parent, inputs_read)


def save_policy(inputs: prepare.Inputs, policy: Any, path: Path) -> None:
    """The policy as a Hugging Face folder, written by the first rank. Collective."""
    tensors = prepare.full_tensors(policy)
    if distributed.rank() == 0:
        dtype = getattr(torch, inputs.config.model.dtype)
        to_hf.save(path, inputs.folder.path, inputs.folder.config, dtype, tensors)
    else:
        for _ in tensors:  # take part in the collectives
            pass


def _peak(config: Config) -> float | None:
    """Operations per second of this rank's GPU, where its data sheet is known."""
    return gpus.peak(torch.cuda.get_device_name(), config.model.dtype) if torch.cuda.is_available() else None


def _config(args: argparse.Namespace) -> Config:
    auto = args.resume == "auto"
    if bool(args.recipe) != (auto or not args.resume):
        raise ConfigError("name a recipe, or --resume RUN, or a recipe and --resume auto")
    if args.step is not None and (auto or not args.resume):
        raise ConfigError("--step says which checkpoint of --resume RUN to go on from")
    if not args.recipe:
        config = settings.from_dict(_written(Path(args.resume)))
        return settings.override(config, [f"run={args.resume}", *args.set])
    config = settings.override(settings.from_recipe(args.recipe), args.set)
    if not auto:
        refuse_existing(config)
    elif (Path(config.run) / "config.json").is_file():
        now = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists, as in the file
        changed = settings.differences(_written(Path(config.run)), now)
        if changed and distributed.rank() == 0:
            files.say(f"{config.run} goes on with other settings than it was started with: {', '.join(changed)}")
    return config


def _written(run: Path) -> dict[str, Any]:
    """The configuration of a run folder."""
    file = run / "config.json"
    if not file.is_file():
        raise ConfigError(f"{run} is not a run folder: it has no config.json")
    return files.read_object(file)
