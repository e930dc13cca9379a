"""The `oreal` command."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings

from oreal_megatron import ranks
from oreal_megatron.config import ConfigError, RunStopped

COMMANDS = {
    "train": "run OREAL with a recipe, or go on with a run folder",
    "sft": "fine-tune on demonstrations before reinforcement learning",
    "evaluate": "held-out accuracy, or pass rates of training prompts",
    "verify": "grade a file of answers against their golds",
    "report": "draw the learning curve of run folders and print what they reached",
}
BAD_INPUT, STOPPED = 2, 3  # exit codes


def main(arguments: list[str] | None = None) -> int:
    if not sys.warnoptions:  # Megatron, vLLM and torch warn at every import; python -W shows them
        warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(prog="oreal", description="OREAL on Megatron-core with colocated vLLM.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = sys.argv[1:] if arguments is None else arguments
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        if arguments[:1] == [name]:  # load only the command that runs: some import for seconds
            module = importlib.import_module(f"oreal_megatron.cli.{name}")
            module.add_arguments(command)
    args = parser.parse_args(arguments)
    try:
        return module.run(args)
    except (ConfigError, RunStopped) as error:
        if ranks.rank() == 0:
            print(f"oreal {args.command}: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, ConfigError) else STOPPED
