"""`oreal sft RECIPE`: supervised fine-tuning on demonstrations, into RUN/policy."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from oreal_megatron import prompts, ranks, settings, supervised
from oreal_megatron.algo.sampler import Sampler
from oreal_megatron.cli import build
from oreal_megatron.cli.train import save_policy
from oreal_megatron.evaluation import evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="path/to/file.py:function, a function that returns a Config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. supervised.steps=500")


def run(args: argparse.Namespace) -> int:
    config = settings.override(settings.from_recipe(args.recipe), args.set)
    inputs = build.prepare(config)
    wanted = config.supervised
    demonstrations = prompts.load_demonstrations(
        wanted.path, inputs.tokenizer, config.data.system_prompt, inputs.arch.max_positions
    )
    held_out = inputs.held_out() if wanted.evaluate_every else []

    from oreal_megatron.mcore import parallel, roles

    parallel.start_process_group()
    engine, verifier = build.start_engine(inputs) if wanted.evaluate_every else (None, None)
    parallel.start_megatron(config.parallel, config.seed)
    policy = roles.Policy(inputs.arch, dataclasses.replace(config, optimizer=wanted.optimizer), inputs.folder.tensor)

    def accuracy() -> float:
        build.hand_over(policy, engine)
        return evaluate(held_out, engine, verifier, config)[0]["accuracy"]

    shown = ranks.rank() == 0
    sampler = Sampler(demonstrations, wanted.samples_per_step, config.seed)
    steps = supervised.imitate(config, sampler, policy, accuracy, shown, parallel.data_parallel())
    save_policy(inputs, policy, Path(config.run) / "policy")
    if shown:
        print(f"{steps} supervised steps done; the policy is in {config.run}/policy")
    if verifier:
        verifier.grader.close()
    parallel.stop(engine)
    return 0
