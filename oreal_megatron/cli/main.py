"""The `oreal` command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings

from oreal_megatron import preemption, ranks
from oreal_megatron.config import ConfigError, Preempted, RunStopped
from oreal_megatron.observe import watchdog

COMMANDS = {
    "train": "run OREAL with a recipe, or go on with a run folder",
    "sft": "fine-tune on demonstrations before reinforcement learning",
    "evaluate": "held-out accuracy, or pass rates of training prompts",
    "verify": "grade a file of answers against their golds",
    "convert": "Hugging Face folder to Megatron checkpoint and back, and whether two are equal",
    "report": "draw the learning curve of run folders and print what they reached",
}
LEAVE_S = 600  # for processes that were asked to leave to save; then they are killed
BAD_INPUT, STOPPED = 2, 3  # exit codes; docs/operations.md says what each asks for


def launch(processes: int, arguments: list[str]) -> int:
    """Start the command in several processes of this machine; its exit code, without torchrun's stack trace.

    A process that a signal ended is a lost rank.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(LEAVE_S))

    torchrun = ["--standalone", "--nproc-per-node", str(processes), "-m", "oreal_megatron"]
    try:
        run(parse_args([*torchrun, *arguments]))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        print(f"oreal: rank {rank} is lost: {first.message}; exit code {watchdog.HUNG}", file=sys.stderr, flush=True)
        return watchdog.HUNG
    except SignalException as notice:  # passed on to the processes, which have left by now
        return preemption.EXIT_CODE if notice.sigval in preemption.SIGNALS else 128 + notice.sigval
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
        watchdog.stop()
        complain(args.command, error)
        if isinstance(error, Preempted):
            return preemption.EXIT_CODE
        return BAD_INPUT if isinstance(error, ConfigError) else STOPPED
    except Exception as error:
        watchdog.failed(error)
        raise
    finally:
        watchdog.stop()
