"""`oreal sft RECIPE`: supervised fine-tuning on demonstrations, into RUN/policy."""

from __future__ import annotations

import argparse

from oreal_megatron.cli import run_config
from oreal_megatron.runtime import distributed
from oreal_megatron.runtime.preemption import StopRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    run_config.add_arguments(parser, "supervised.steps=500")


def run(args: argparse.Namespace) -> int:
    """Fine-tune; return the exit code."""
    with StopRequest() as stop_request:
        config = run_config.load_config(args)

        from oreal_megatron.training import supervised  # imports transformers, which takes seconds

        steps = supervised.fine_tune(config, args.resume, args.step, stop_request, run_config.origin(args.recipe))
    if distributed.rank() == 0:
        print(f"{steps} supervised steps done; the policy is in {config.run}/policy")
    return 0
