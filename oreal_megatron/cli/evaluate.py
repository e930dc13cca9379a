"""`oreal evaluate MODEL`: benchmarks beside the paper's; `oreal evaluate RECIPE --rate`: pass rates of its prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

from oreal_megatron.cli.arguments import at_least, output_file
from oreal_megatron.config import ConfigError
from oreal_megatron.evaluation import results, suites
from oreal_megatron.evaluation.model_settings import config_for
from oreal_megatron.runtime import distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("model", help="Hugging Face folder, checkpoint of a run, or path/to/file.py:function")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. engine.kv_cache_gib=40")
    parser.add_argument(
        "--suite", metavar="A,B", help=f"{', '.join(suites.SUITES)}, FILE.jsonl or hub:OWNER/DATASET:FILE.jsonl"
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data"), metavar="FOLDER", help="folder of the suites (default data)"
    )
    parser.add_argument(
        "--problems", type=at_least(0), default=0, metavar="N", help="use only the first N of each suite"
    )
    parser.add_argument(
        "--samples",
        type=at_least(1),
        metavar="K",
        help="sample K responses per problem beside the greedy one; --rate: 16",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="default: runs/evaluations/NAME, with --rate OUT.jsonl.answers; a second start continues there",
    )
    parser.add_argument("--training", metavar="FILE.jsonl", help="check the suites for contamination with these")
    parser.add_argument(
        "--rate",
        type=output_file,
        metavar="OUT.jsonl",
        help="sample the training prompts and write them with pass_rate",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate or rate; return the exit code."""
    if args.rate and (args.suite or args.problems or args.training):
        raise ConfigError("--rate rates the training prompts; leave --suite, --problems and --training out")
    config = config_for(args.model, args.set)

    from oreal_megatron.evaluation import benchmark  # imports torch's process groups, which takes a second

    if args.rate:
        out = args.out or Path(f"{args.rate}.answers")
        scores = benchmark.rate_prompts(config, args.samples or 16, args.rate, out)
        if distributed.rank() == 0:
            low, high = scores["interval"]
            responses = scores["problems"] * scores["answers_per_problem"]
            print(f"accuracy {scores['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}) of {responses}\n"
                  f"responses, {scores['unknown']} unknown; responses: {out}")  # fmt: skip
        return 0
    names = args.suite.split(",") if args.suite else [config.data.held_out]
    own = {config.data.held_out: suites.of_reader(config.data.held_out)} if config.data.reader else {}
    suite_files = {name: own.get(name) or suites.find(name, args.data) for name in filter(None, names)}
    if not suite_files:
        raise ConfigError("nothing to evaluate on; choose suites with --suite")
    out = args.out or results.default_folder(args.model)
    benchmark.run_benchmark(config, args.model, suite_files, args.problems, args.samples, args.training or "", out)
    return 0
