"""`oreal reward-model RECIPE`: train the reward model on rollouts with verdicts, before `oreal train`."""

from __future__ import annotations

import argparse

from oreal_megatron.cli import run_config
from oreal_megatron.runtime import distributed
from oreal_megatron.runtime.preemption import StopRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    run_config.add_arguments(parser, "reward_training.path=OUT.jsonl.answers/NAME.rating.jsonl")


def run(args: argparse.Namespace) -> int:
    """Train; return the exit code."""
    with StopRequest() as stop_request:
        config = run_config.load_config(args)

        from oreal_megatron.training import reward_model  # imports Megatron and vLLM, which takes seconds

        origin = run_config.origin(args.recipe)
        result = reward_model.train_reward_model(config, args.resume, args.step, stop_request, origin)
    if distributed.rank() == 0:
        print(
            f"{result.steps} steps; held-out AUC {result.start:.3f} before, {result.best:.3f} after {result.best_step}"
        )
        folder = f"{config.run}/{reward_model.FOLDER}"
        if result.best_step:
            print(f"the best weights are in {folder}; start from them with --set reward_model.path={folder}")
        else:
            print("no evaluation was better than the first: there is nothing to start from")
    return 0
