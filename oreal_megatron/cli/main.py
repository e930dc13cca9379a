"""The `oreal` command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings

from oreal_megatron import ranks
from oreal_megatron.config import ConfigError, RunStopped

COMMANDS = {
    "train": "run OREAL with a recipe, or go on with a run folder",
    "sft": "fine-tune on demonstrations before reinforcement learning",
    "evaluate": "held-out accuracy, or pass rates of training prompts",
    "verify": "grade a file of answers against their golds",
    "plan": "memory, time and bytes of a run, and a rehearsal of its ranks, before a GPU is spent",
    "convert": "Hugging Face folder to Megatron checkpoint and back, and whether two are equal",
    "report": "draw the learning curve of run folders and print what they reached",
}
BAD_INPUT, STOPPED = 2, 3  # exit codes


def launch(processes: int, arguments: list[str]) -> int:
    """Start the command in several processes of this machine; its exit code, without torchrun's stack trace."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    torchrun = ["--standalone", "--nproc-per-node", str(processes), "-m", "oreal_megatron"]
    try:
        run(parse_args([*torchrun, *arguments]))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0


def complain(command: str, error: Exception) -> None:
    """Say the sentence once: other ranks wait a moment, and speak only if they are not ended with the first."""
    if ranks.rank():
        time.sleep(3)
        command = f"{command} (rank {ranks.rank()})"
    print(f"oreal {command}: {error}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    if not sys.warnoptions:  # Megatron, vLLM and torch warn at every import; python -W shows them
        warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(prog="oreal", description="OREAL on Megatron-core with colocated vLLM.")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="start N processes on this machine, as torchrun does"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = next((word for word in arguments if word in COMMANDS), None)
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        if name == chosen:  # load only the command that runs: some import for seconds
            module = importlib.import_module(f"oreal_megatron.cli.{name}")
            module.add_arguments(command)
    args = parser.parse_args(arguments)
    if args.processes and "RANK" not in os.environ:
        return launch(args.processes, arguments[arguments.index(chosen) :])
    try:
        return module.run(args)
    except (ConfigError, RunStopped) as error:
        complain(args.command, error)
        return BAD_INPUT if isinstance(error, ConfigError) else STOPPED
