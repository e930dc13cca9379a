"""Parts of the command lines: launch options, bounded numbers, and shell completion where argcomplete is installed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from oreal_megatron.config import Config, ConfigError
from oreal_megatron.config.schema import config_keys
from oreal_megatron.runtime import files

SHARED = (
    "train",
    "sft",
    "distill",
    "evaluate",
    "replay",
    "reward-model",
)  # commands whose work several processes share


def at_least(low: int) -> Callable[[str], int]:
    """Return an argparse type for whole numbers from `low` on."""

    def whole_number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, got {text}")
        return int(text)

    return whole_number


def output_file(text: str) -> Path:
    """Return an argparse type for a file that will be written; refused before anything is computed."""
    try:
        return files.require_writable(Path(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def refuse_unknown(parser: argparse.ArgumentParser, words: Sequence[str], command: str) -> None:
    """End the program with a message about words that the parser does not know; launch options precede the command."""
    options = {option for action in parser._actions for option in action.option_strings}
    misplaced = next((word.partition("=")[0] for word in words if word.partition("=")[0] in options), "")
    hint = f"; {misplaced} stands before the command: oreal {misplaced} ... {command}" if misplaced else ""
    parser.error(f"unrecognized arguments: {' '.join(words)}{hint}")


def refuse_alone(args: argparse.Namespace, **needed: str) -> None:
    """Raise ConfigError for an option without the one that it belongs to, which would be ignored."""
    for option, other in needed.items():
        if getattr(args, option) and getattr(args, other) in (None, False):
            raise ConfigError(f"--{option} needs --{other}; add that, or leave --{option} out")


def works_alone(args: argparse.Namespace) -> bool:
    """Return whether several processes were asked for that the command could not share its work with."""
    started = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    return args.command not in SHARED and (args.processes or started) > 1


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that start a command in several processes."""
    parser.add_argument(
        "--processes", type=at_least(1), metavar="N", help="processes to start on this node, as with torchrun"
    )
    nodes = "number of nodes; start the same command on each (default 1)"
    parser.add_argument("--nodes", type=at_least(1), default=1, metavar="N", help=nodes)
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="address where nodes meet: one of them, a free port")
    restarts = "restarts after exit codes 1 and 5 (default 0)"
    parser.add_argument("--max-restarts", type=at_least(0), default=0, metavar="N", help=restarts)
    parser.add_argument("--logs", metavar="FOLDER", help="write each process's output here; the first is also shown")


def words() -> list[str]:
    """Return the command line that the shell wants completed; empty in an ordinary call."""
    return os.environ.get("COMP_LINE", "").split()[1:] if "_ARGCOMPLETE" in os.environ else []


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell's request for completions and exit, if this call is one."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete  # optional

        argcomplete.autocomplete(parser)


def offer_config_keys(parser: argparse.ArgumentParser) -> None:
    """Let `--set` of a command be completed with the keys of the configuration."""
    for action in parser._actions:
        if "--set" in action.option_strings:
            vars(action)["completer"] = matching_keys  # the attribute that argcomplete reads


def matching_keys(prefix: str, **_: object) -> list[str]:
    """Return the configuration keys that begin with `prefix`, each with its equals sign."""
    return [f"{key.path}=" for key in config_keys(Config()) if key.path.startswith(prefix)]
