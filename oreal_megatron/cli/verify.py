"""`oreal verify IN.jsonl OUT.jsonl`: grade a file of answers and print a summary."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from oreal_megatron import config
from oreal_megatron.runtime import files
from oreal_megatron.verify.file_summary import FileSummary
from oreal_megatron.verify.grade_file import grade_lines
from oreal_megatron.verify.grader import Grader, JudgesDown
from oreal_megatron.verify.worker_pool import PoolBroken


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    defaults = config.VerifyConfig()
    parser.add_argument("input", type=Path, metavar="IN.jsonl", help="lines with `gold` and `pred` (or `response`)")
    parser.add_argument(
        "output", type=Path, metavar="OUT.jsonl", help="the same lines with verdict, method, extracted, seconds"
    )
    parser.add_argument("--workers", type=int, default=defaults.workers, help="grading processes (default %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=defaults.timeout_s, metavar="S", help="per answer (default %(default)s)"
    )
    parser.add_argument(
        "--judge",
        nargs="+",
        default=[],
        metavar="URL",
        help="OpenAI-compatible servers of an LLM judge, for answers that the rules call incorrect",
    )
    parser.add_argument("--judge-model", default="", metavar="NAME", help="default: the first model of the server")
    parser.add_argument("--judge-cache", default="", metavar="FILE", help="the judge's verdicts, kept between runs")


def run(args: argparse.Namespace) -> int:
    """Grade the file; return the exit code.

    Raises ConfigError for bad arguments, RunStopped when no judge answers or no worker process starts.
    """
    _check(args)
    judge = config.JudgeConfig(urls=tuple(args.judge), model=args.judge_model, cache=args.judge_cache)
    settings = config.VerifyConfig(workers=args.workers, timeout_s=args.timeout, judge=judge)
    summary = FileSummary()
    files.set_aside(args.output)
    try:
        with (
            Grader(settings) as grader,
            args.input.open("rb") as lines,
            args.output.open("w") as out,
            _progress() as bar,
        ):
            task = bar.add_task("grading", total=_count_lines(args.input))
            for line in grade_lines(grader, lines, lambda error: _report(bar.console, error)):
                out.write(json.dumps(line.output()) + "\n")
                summary.add(line)
                bar.advance(task)
    except (JudgesDown, PoolBroken) as error:
        raise config.RunStopped(f"{error}. {args.output} holds the answers graded so far") from error
    summary.print(Console())
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that cannot be right, before any process starts."""
    if not args.input.is_file():
        needs = "give a JSONL file with `gold` and `pred` (or `response`) on each line"
        raise config.ConfigError(f"{args.input} is not a file; {needs}")
    if args.output.exists() and args.output.samefile(args.input):
        raise config.ConfigError(f"the output {args.output} is the input; give another name")
    if not args.output.parent.is_dir():
        raise config.ConfigError(f"the folder {args.output.parent} of the output does not exist; create it first")
    if args.workers < 1 or args.timeout <= 0:
        got = f"got {args.workers} and {args.timeout:g}"
        raise config.ConfigError(f"--workers must be at least 1 and --timeout above 0, {got}")
    for url in args.judge:
        if not url.startswith(("http://", "https://")):
            raise config.ConfigError(f"{url!r} is not the URL of a judge; write http://HOST:PORT")


def _report(console: Console, error: str) -> None:
    console.print(f"oreal verify: {error}", style="yellow", highlight=False, markup=False)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True, soft_wrap=True), transient=True)


def _count_lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
