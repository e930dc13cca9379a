"""`oreal doctor [RECIPE]`: check whether this machine is ready. Exit code 1 if a check failed."""

from __future__ import annotations

import argparse

from oreal_megatron.cli.arguments import at_least
from oreal_megatron.doctor.all_checks import print_results, run_checks
from oreal_megatron.doctor.checks import FAILED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("recipe", nargs="?", help="path/to/file.py:function; also check its model, data, disk, judges")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. model.path=FOLDER")
    parser.add_argument("--quick", action="store_true", help="skip the real runs: half a minute, on GPUs some minutes")
    parser.add_argument(
        "--gpus", type=at_least(1), default=0, metavar="N", help="run them on the first N GPUs (default: all)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the checks and print their table; return the exit code."""
    results = list(run_checks(args.recipe, args.set, args.quick, args.gpus))
    print_results(results)
    failed = sum(result.state == FAILED for result in results)
    print(f"{failed} of {len(results)} checks failed" if failed else f"{len(results)} checks, none failed")
    return 1 if failed else 0
