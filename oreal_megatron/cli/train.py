"""`oreal train RECIPE`: reinforcement learning with a recipe, or with the run folder of an interrupted run."""

from __future__ import annotations

import argparse

from oreal_megatron.cli import run_config
from oreal_megatron.runtime.preemption import StopRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    run_config.add_arguments(parser, "loss.kl_coef=0.02")


def run(args: argparse.Namespace) -> int:
    """Train; return the exit code."""
    with StopRequest() as stop_request:
        config = run_config.load_config(args)

        from oreal_megatron.training import reinforcement  # imports Megatron and vLLM, which takes seconds

        reinforcement.train(config, args.resume, args.step, stop_request, run_config.origin(args.recipe))
    return 0
