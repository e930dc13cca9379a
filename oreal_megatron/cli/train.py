"""`oreal train RECIPE`: build the pieces, call the loop, leave the policy as a Hugging Face folder."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from oreal_megatron import loop, ranks, settings
from oreal_megatron.algo import sampler
from oreal_megatron.cli import build
from oreal_megatron.config import Config, ConfigError
from oreal_megatron.convert import to_hf
from oreal_megatron.evaluation import evaluate
from oreal_megatron.observe.run import Run, refuse_changed, refuse_existing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="path/to/file.py:function, a function that returns a Config")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run folder from its newest checkpoint")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. loss.kl_coef=0.02")


def run(args: argparse.Namespace) -> int:
    config = _config(args)
    inputs = build.prepare(config)
    prompts = sampler.balanced(inputs.prompts(config.data.path), config.data, config.seed)
    held_out = inputs.held_out()

    from oreal_megatron.mcore import checkpoint, model, parallel, roles  # imports Megatron, which takes seconds

    folder, trained = Path(config.run) / "checkpoints", ["policy"] + ["reward_model"] * config.reward_model.enabled
    resumed = checkpoint.newest(folder, trained) if args.resume else None
    model.transformer_config(inputs.arch, config)  # refuses what Megatron would, before anything is loaded
    inputs_read = inputs.fingerprints()
    if resumed:
        refuse_changed(Path(config.run), inputs_read)

    parallel.start_process_group()
    engine, verifier = build.start_engine(inputs)
    parallel.start_megatron(config.parallel, config.seed)
    pieces = (inputs.arch, config, inputs.folder.tensor)
    policy, reference = roles.Policy(*pieces), roles.Reference(*pieces)
    reward_model = roles.TokenRewardModel(*pieces) if config.reward_model.enabled else roles.NoRewardModel()
    trainers = dict(zip(trained, (policy, reward_model), strict=False))
    hand_over = build.connect(policy, engine)
    first = checkpoint.load(resumed, trainers) if resumed else 0
    record = Run(config, first, inputs_read, parallel.share())

    def after_step(done: int) -> None:
        if done and _due(done, config.checkpoint.every, config.steps):
            checkpoint.save(folder, done, trainers, config.checkpoint.keep, partial(build.describe, inputs))
            record.forget_dumps(checkpoint.complete(folder)[0].name)
        if held_out and _due(done, config.evaluation.every, config.steps):
            record.log_evaluation(done, evaluate(held_out, engine, verifier, config)[0])

    if resumed:
        hand_over(policy.updates)
    else:
        after_step(0)
    world = parallel.data_parallel(inputs.arch)
    loop.train(config, prompts, engine, verifier, policy, reference, reward_model, hand_over, record, after_step, world)
    save_policy(inputs, policy, Path(config.run) / "policy")
    verifier.grader.close()
    parallel.stop(engine)
    return 0


def save_policy(inputs: build.Inputs, policy: Any, path: Path) -> None:
    """The policy as a Hugging Face folder, written by the first rank. Collective."""
    tensors = build.full_tensors(policy)
    if ranks.rank() == 0:
        dtype = getattr(torch, inputs.config.model.dtype)
        to_hf.save(path, inputs.folder.path, inputs.folder.config, dtype, tensors)
    else:
        for _ in tensors:  # take part in the collectives
            pass


def _config(args: argparse.Namespace) -> Config:
    if bool(args.recipe) == bool(args.resume):
        raise ConfigError("name either a recipe or --resume RUN")
    if args.recipe:
        config = settings.override(settings.from_recipe(args.recipe), args.set)
        refuse_existing(config)
        return config
    file = Path(args.resume) / "config.json"
    if not file.is_file():
        raise ConfigError(f"{args.resume} is not a run folder: it has no config.json")
    return settings.override(settings.from_dict(json.loads(file.read_text())), [f"run={args.resume}", *args.set])


def _due(done: int, every: int, steps: int) -> bool:
    """Before the first step, every so many steps, and after the last."""
    return done in (0, steps) or (every > 0 and done % every == 0)
