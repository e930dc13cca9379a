"""Arguments of the commands that begin or continue a run folder, and the configuration that they name."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from oreal_megatron import settings
from oreal_megatron.config import Config, ConfigError
from oreal_megatron.config.user_functions import Origin, read_source
from oreal_megatron.runtime import files


def add_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """Declare recipe, resume and changes of settings."""
    parser.add_argument(
        "recipe", nargs="?", help="FILE.py:FUNCTION, which returns a Config; FILE.py alone if it holds one"
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="continue this run folder from its newest checkpoint; with a recipe, `auto`: continue the recipe's run "
        "folder from its newest sound checkpoint, or begin where there is none",
    )
    parser.add_argument("--step", type=int, metavar="N", help="resume from the checkpoint after N steps instead")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"e.g. {example}")


def load_config(args: argparse.Namespace) -> Config:
    """Return the configuration of a recipe or a run folder."""
    auto = args.resume == "auto"
    if bool(args.recipe) != (auto or not args.resume):
        raise ConfigError("name a recipe, or --resume RUN, or a recipe and --resume auto")
    if args.step is not None and (auto or not args.resume):
        raise ConfigError("--step needs --resume RUN: it names the checkpoint of that run to continue from")
    if args.recipe:
        return settings.load(args.recipe, args.set)
    file = Path(args.resume) / "config.json"
    if not file.is_file():
        raise ConfigError(f"{args.resume} is not a run folder: it has no config.json")
    return settings.override(settings.from_dict(files.read_object(file)), [f"run={args.resume}", *args.set])


def origin(recipe: str | None) -> Origin:
    """Return the command line of this process, and the recipe that it names."""
    return Origin(shlex.join(["oreal", *sys.argv[1:]]), read_source(recipe) if recipe else None)
