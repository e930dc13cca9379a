"""The `oreal` command: parse, start processes if asked to, run one command, turn its errors into an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from types import ModuleType

import oreal_megatron
from oreal_megatron.cli import arguments
from oreal_megatron.config import ConfigError, Preempted, RunStopped
from oreal_megatron.runtime import logging_setup
from oreal_megatron.runtime.exit_codes import BAD_INPUT, PREEMPTED, STOPPED

COMMANDS = {
    "train": "train with a recipe, or continue a run folder",
    "sft": "fine-tune on demonstrations before reinforcement learning",
    "distill": "fine-tune on demonstrations and on the features of a teacher",
    "reward-model": "train the reward model on rollouts with verdicts, before reinforcement learning",
    "data": "filter problems, or turn correct rollouts into demonstrations",
    "evaluate": "measure accuracy on benchmarks, or pass rates of training problems",
    "config": "list the configuration keys, or the settings of a recipe",
    "doctor": "check this machine, and the inputs that a recipe needs",
    "plan": "estimate memory, time and traffic of a run without a GPU",
    "verify": "grade a file of responses against their gold answers",
    "convert": "convert Hugging Face folders and Megatron checkpoints, or compare two",
    "replay": "recompute a dumped step and compare the results",
    "report": "plot the learning curves of run folders and print their results",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code (runtime/exit_codes.py)."""
    logging_setup.set_up()
    argv = sys.argv[1:] if argv is None else argv
    command = next((word for word in arguments.words() or argv if word in COMMANDS), None)
    command_line = parser(command)
    arguments.complete(command_line)
    args, unknown = command_line.parse_known_args(argv)
    if unknown:
        arguments.refuse_unknown(command_line, unknown, args.command)
    if arguments.works_alone(args):
        print(f"oreal: {args.command} works in one process; start it without --processes or torchrun", file=sys.stderr)
        return BAD_INPUT
    return _run(args, argv[argv.index(args.command) :])


def complain(command: str, error: Exception) -> None:
    """Print an error once: other ranks wait a moment, and print it only if they are not ended with the first."""
    if rank := int(os.environ.get("RANK", 0)):
        time.sleep(3)
        command = f"{command} (rank {rank})"
    print(f"oreal {command}: {error}", file=sys.stderr, flush=True)


def parser(command: str | None) -> argparse.ArgumentParser:
    """Return the command line; only the given command's module is loaded, because some import for seconds."""
    parser = argparse.ArgumentParser(
        prog="oreal",
        description="OREAL on Megatron-core with colocated vLLM engines.",
        epilog='shell completion: pip install argcomplete, then\n  eval "$(register-python-argcomplete oreal)"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"oreal-megatron {oreal_megatron.__version__}")
    arguments.add_launch_options(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        subparser = commands.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
        if name == command:
            _module(name).add_arguments(subparser)
            arguments.offer_config_keys(subparser)
    return parser


def _module(command: str) -> ModuleType:
    """Return the module of a command."""
    return importlib.import_module(f"oreal_megatron.cli.{command.replace('-', '_')}")


def _run(args: argparse.Namespace, words: list[str]) -> int:
    from oreal_megatron.runtime import watchdog  # imports torch, which takes seconds

    try:
        if args.processes and "TORCHELASTIC_RUN_ID" not in os.environ:
            from oreal_megatron.runtime.launcher import launch

            return launch(args, words)
        return int(_module(args.command).run(args))
    except (ConfigError, RunStopped) as error:
        watchdog.stop()
        complain(args.command, error)
        return BAD_INPUT if isinstance(error, ConfigError) else PREEMPTED if isinstance(error, Preempted) else STOPPED
    except Exception as error:
        watchdog.failed(error)
        raise
    finally:
        watchdog.stop()
