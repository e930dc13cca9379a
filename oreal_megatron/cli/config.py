"""`oreal config [RECIPE]`: every configuration key with value, type, bounds and meaning."""

from __future__ import annotations

import argparse
import json
import shutil

from oreal_megatron import settings
from oreal_megatron.config import Config, reference, validate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("recipe", nargs="?", help="path/to/file.py:function; without it the defaults are listed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. optimizer.lr=1e-6")
    parser.add_argument("--json", action="store_true", help="print a JSON list of objects instead of text")


def run(args: argparse.Namespace) -> int:
    """List the keys, then check their values; return the exit code."""
    config = settings.load(args.recipe, args.set) if args.recipe else settings.override(Config(), args.set)
    if args.json:
        print(json.dumps(reference.as_objects(config), indent=2))
    else:
        print(reference.list_keys(config, width=min(shutil.get_terminal_size((80, 24)).columns, 120)))
    validate(config)  # after the listing, which shows what is wrong
    return 0
