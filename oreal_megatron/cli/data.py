"""`oreal data filter`, `rft`, `merge` and `skills`: problems to train on, and demonstrations."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from oreal_megatron.cli import data_replies
from oreal_megatron.cli.arguments import at_least, output_file
from oreal_megatron.config import ConfigError
from oreal_megatron.config.algorithm import KEY_FIELDS
from oreal_megatron.data import demonstrations, filter_problems, merge_attempts, skills
from oreal_megatron.data.decisions import SUFFIX


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-commands and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "keep problems that are readable, new, of the right difficulty and in no test file"
    problems = actions.add_parser("filter", help=text, description=text)
    problems.add_argument("input", metavar="IN", help="FILE.jsonl, FILE.parquet or hub:OWNER/DATASET:FILE")
    problems.add_argument("output", type=output_file, metavar="OUT.jsonl")
    rate = "pass rate of a problem (`oreal evaluate RECIPE --rate`)"
    problems.add_argument("--min-rate", type=float, default=0.0, metavar="P", help=f"lowest {rate}")
    problems.add_argument("--max-rate", type=float, default=1.0, metavar="P", help=f"highest {rate}; T1: 0.3")
    problems.add_argument(
        "--against", nargs="+", default=[], metavar="FILE", help="test files, no problem of which may be trained on"
    )
    problems.add_argument("--key", action="append", default=[], metavar="FIELD=KEY", help="as data.keys of a recipe")
    text = "write correct rollouts as demonstrations for `oreal sft` (rejection-sampling fine-tuning)"
    chosen = actions.add_parser("rft", help=text, description=text)
    chosen.add_argument("inputs", nargs="+", metavar="IN", help="rollouts with verdicts: JSONL files or run folders")
    chosen.add_argument("output", type=output_file, metavar="OUT.jsonl")
    chosen.add_argument("--choose", choices=("shortest", "random"), default="shortest", help="default %(default)s")
    chosen.add_argument("--per-problem", type=at_least(1), default=1, metavar="N", help="most of a problem (default 1)")
    chosen.add_argument("--seed", type=int, default=0, help="of --choose random (default 0)")
    data_replies.add_arguments(actions)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command; return the exit code."""
    if args.action == "filter":
        _filter(args)
    elif args.action == "rft":
        _choose(args)
    elif args.action == "merge":
        _print_counts(data_replies.merge(args), merge_attempts.REASONS, "problems")
    elif args.server:
        _print_counts(data_replies.annotate(args), skills.REASONS, "problems")
    else:
        data_replies.draw(args)
    return 0


def _filter(args: argparse.Namespace) -> None:
    from oreal_megatron.math_equality import rules

    settings = filter_problems.ProblemFilter(args.min_rate, args.max_rate, tuple(args.against), _keys(args.key))
    counts = filter_problems.filter_file(args.input, args.output, settings, rules.equals_itself)
    _print_counts(counts, filter_problems.REASONS, "problems")
    print(f"{args.output}{SUFFIX} names the reason for each line of the input")


def _choose(args: argparse.Namespace) -> None:
    choice = demonstrations.DemonstrationChoice(args.choose, args.per_problem, args.seed)
    counts, covered, uncovered = demonstrations.write_demonstrations(args.inputs, Path(args.output), choice)
    _print_counts(counts, demonstrations.REASONS, "rollouts")
    print(f"{covered} problems have demonstrations, {uncovered} have no correct rollout")


def _print_counts(counts: Mapping[str, int], reasons: tuple[str, ...], noun: str) -> None:
    print(f"{counts.get('', 0)} of {sum(counts.values())} {noun} are in the output; dropped:")
    for reason in reasons:
        print(f"{counts.get(reason, 0):8} {reason}")


def _keys(changes: list[str]) -> dict[str, str]:
    """Return the key map of FIELD=KEY arguments."""
    keys = dict(change.partition("=")[::2] for change in changes)
    for field, key in keys.items():
        if field not in KEY_FIELDS or not key:
            raise ConfigError(f"--key {field}={key}: expected one of {', '.join(KEY_FIELDS)}, an equals sign and a key")
    return keys
