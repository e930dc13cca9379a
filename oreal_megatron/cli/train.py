"""`oreal train RECIPE`: build the pieces, call the loop, leave the policy as a Hugging Face folder."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from oreal_megatron import loop, ranks, settings
from oreal_megatron.algo import sampler
from oreal_megatron.cli import build
from oreal_megatron.config import Config, ConfigError
from oreal_megatron.evaluation import evaluate
from oreal_megatron.observe.run import Run, refuse_existing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="path/to/file.py:function, a function that returns a Config")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run folder from its newest checkpoint")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. loss.kl_coef=0.02")


def run(args: argparse.Namespace) -> int:
    config = _config(args)
    inputs = build.prepare(config)
    prompts = sampler.balanced(inputs.prompts(config.data.path), config.data, config.seed)
    held_out = (
        inputs.prompts(config.data.held_out)[: config.evaluation.problems or None] if config.data.held_out else []
    )

    from oreal_megatron.mcore import checkpoint, parallel, roles

    parallel.start_process_group()
    engine, verifier = build.start_engine(inputs)
    parallel.start_megatron(config.parallel, config.seed)
    pieces = (inputs.arch, config, inputs.folder.tensor)
    policy, reference = roles.Policy(*pieces), roles.Reference(*pieces)
    reward_model = roles.TokenRewardModel(*pieces) if config.reward_model.enabled else roles.NoRewardModel()
    trainers = {"policy": policy} | ({"reward_model": reward_model} if config.reward_model.enabled else {})
    hand_over = partial(build.hand_over, policy, engine)

    first = 0
    if args.resume:
        first = checkpoint.load(_newest(checkpoint.complete(_checkpoints(config)), config), trainers)
        hand_over()
    record = Run(config, first)

    def after_step(done: int) -> None:
        if held_out and _due(done, config.evaluation.every, config.steps):
            record.log_evaluation(done, evaluate(held_out, engine, verifier, config)[0])
        if _due(done, config.checkpoint.every, config.steps):
            checkpoint.save(_checkpoints(config), done, trainers, config.checkpoint.keep)

    if held_out and not args.resume:
        record.log_evaluation(0, evaluate(held_out, engine, verifier, config)[0])
    loop.train(
        config, prompts, engine, verifier, policy, reference, reward_model, hand_over, record, after_step,
        parallel.data_parallel(),
    )  # fmt: skip
    save_policy(inputs, policy, Path(config.run) / "policy")
    verifier.grader.close()
    parallel.stop(engine)
    return 0


def save_policy(inputs: build.Inputs, policy: Any, path: Path) -> None:
    """The policy as a Hugging Face folder, written by the first rank. Collective."""
    tensors = build.full_tensors(policy)
    if ranks.rank() == 0:
        inputs.folder.save_as(path, tensors)
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


def _checkpoints(config: Config) -> Path:
    return Path(config.run) / "checkpoints"


def _newest(found: list[Path], config: Config) -> Path:
    if not found:
        raise ConfigError(f"{_checkpoints(config)} holds no finished checkpoint to resume from")
    return found[-1]


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)
