"""`oreal verify IN.jsonl OUT.jsonl`: grade a file of answers and print a summary."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from oreal_megatron import config
from oreal_megatron.runtime import files
from oreal_megatron.runtime.chat_client import ServersDown
from oreal_megatron.runtime.exit_codes import BAD_INPUT
from oreal_megatron.verify import graded_files, judge
from oreal_megatron.verify.file_summary import FileSummary
from oreal_megatron.verify.grade_file import grade_lines
from oreal_megatron.verify.grader import Grader
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
    """Grade the file; return the exit code: that of bad input where a line cannot be graded.

    Raises ConfigError for bad arguments, RunStopped when no judge answers or no worker process starts.
    """
    judge_settings = config.JudgeConfig(urls=tuple(args.judge), model=args.judge_model, cache=args.judge_cache)
    settings = config.VerifyConfig(workers=args.workers, timeout_s=args.timeout, judge=judge_settings)
    _check(args, settings)
    summary = FileSummary()
    files.set_aside(args.output)
    try:
        with (
            Grader(settings) as grader,
            args.input.open("rb") as lines,
            graded_files.open_output(args.output) as out,
            _progress() as bar,
        ):
            task = bar.add_task("grading", total=graded_files.count_lines(args.input))
            for line in grade_lines(grader, lines, lambda error: _report(bar.console, error)):
                out.write(json.dumps(line.output()) + "\n")
                summary.add(line)
                bar.advance(task)
    except (ServersDown, PoolBroken) as error:
        raise config.RunStopped(f"{error}. {args.output} holds the answers graded so far") from error
    summary.print(Console())
    if summary.unreadable:
        total = summary.unreadable + len(summary.seconds)
        print(f"{summary.unreadable} of {total} lines could not be graded; fix them (they are named above)")
    return BAD_INPUT if summary.unreadable else 0


def _check(args: argparse.Namespace, settings: config.VerifyConfig) -> None:
    """Refuse arguments that cannot be right, before any process starts."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise config.ConfigError("verify runs in one process; start it without --processes, and set --workers instead")
    graded_files.check(args.input, args.output)
    config.validate(settings, "verify.")
    judge.check_settings(settings.judge)
    if args.judge and args.judge_cache:
        files.refuse_same(args.input, args.output, Path(args.judge_cache))


def _report(console: Console, error: str) -> None:
    console.print(f"oreal verify: {error}", style="yellow", highlight=False, markup=False)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True, soft_wrap=True), transient=True)
