"""`oreal distill RECIPE`: supervised fine-tuning with the features of a teacher, into RUN/policy."""

from __future__ import annotations

import argparse

from oreal_megatron.cli import run_config
from oreal_megatron.runtime import distributed
from oreal_megatron.runtime.preemption import StopRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    run_config.add_arguments(parser, "distillation.teacher=models/large")


def run(args: argparse.Namespace) -> int:
    """Distil; return the exit code."""
    with StopRequest() as stop_request:
        config = run_config.load_config(args)

        from oreal_megatron.training import distillation, supervised  # import transformers, which takes seconds

        method, origin = distillation.Distillation(), run_config.origin(args.recipe)
        steps = supervised.fine_tune(config, args.resume, args.step, stop_request, origin, method)
    if distributed.rank() == 0:
        print(f"{steps} steps of distillation done; the policy is in {config.run}/policy")
    return 0
