"""The `oreal` command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time

from oreal_megatron.config import ConfigError, Preempted, RunStopped
from oreal_megatron.runtime import distributed, logging_setup, watchdog
from oreal_megatron.runtime.exit_codes import BAD_INPUT, PREEMPTED, STOPPED

COMMANDS = {
    "train": "run OREAL with a recipe, or go on with a run folder",
    "sft": "fine-tune on demonstrations before reinforcement learning",
    "evaluate": "held-out accuracy, or pass rates of training prompts",
    "doctor": "whether this machine, and what a recipe needs, is ready for a run",
    "verify": "grade a file of answers against their golds",
    "plan": "memory, time and bytes of a run, and a rehearsal of its ranks, before a GPU is spent",
    "convert": "Hugging Face folder to Megatron checkpoint and back, and whether two are equal",
    "replay": "compute a dumped step again, and compare",
    "report": "draw the learning curve of run folders and print what they reached",
}


def complain(command: str, error: Exception) -> None:
    """Say the sentence once: other ranks wait a moment, and speak only if they are not ended with the first."""
    if distributed.rank():
        time.sleep(3)
        command = f"{command} (rank {distributed.rank()})"
    print(f"oreal {command}: {error}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code (runtime/exit_codes.py)."""
    logging_setup.set_up()
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = next((word for word in arguments if word in COMMANDS), None)
    args = parser(chosen).parse_args(arguments)
    if args.processes and "LOCAL_RANK" not in os.environ:
        from oreal_megatron.runtime.launcher import launch

        return launch(args, arguments[arguments.index(chosen) :])
    try:
        return importlib.import_module(f"oreal_megatron.cli.{chosen}").run(args)
    except (ConfigError, RunStopped) as error:
        watchdog.stop()
        complain(args.command, error)
        if isinstance(error, Preempted):
            return PREEMPTED
        return BAD_INPUT if isinstance(error, ConfigError) else STOPPED
    except Exception as error:
        watchdog.failed(error)
        raise
    finally:
        watchdog.stop()


def parser(chosen: str | None) -> argparse.ArgumentParser:
    """Of the command line; only the chosen command is loaded, because some import for seconds."""
    parser = argparse.ArgumentParser(prog="oreal", description="OREAL on Megatron-core with colocated vLLM.")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="start N processes on this machine, as torchrun does"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that are started alike (default 1)")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="where they meet: one of them, and a free port of it")
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="how often lost processes are replaced"
    )
    parser.add_argument("--logs", metavar="FOLDER", help="each process's output in a file here; shown: the first one's")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        if name == chosen:
            importlib.import_module(f"oreal_megatron.cli.{name}").add_arguments(command)
    return parser
