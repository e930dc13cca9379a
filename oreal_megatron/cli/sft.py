"""`oreal sft RECIPE`: supervised fine-tuning on demonstrations, into RUN/policy."""

from __future__ import annotations

import argparse

from oreal_megatron import settings
from oreal_megatron.cli import run_config
from oreal_megatron.runtime import distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("recipe", help="FILE.py:FUNCTION, which returns a Config; FILE.py alone if it holds one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. supervised.steps=500")


def run(args: argparse.Namespace) -> int:
    """Fine-tune; return the exit code."""
    from oreal_megatron.training import supervised  # imports torch's data and transformers, which takes seconds

    config = settings.load(args.recipe, args.set)
    steps = supervised.fine_tune(config, run_config.origin(args.recipe))
    if distributed.rank() == 0:
        print(f"{steps} supervised steps done; the policy is in {config.run}/policy")
    return 0
