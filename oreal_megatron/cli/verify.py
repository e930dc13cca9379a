"""oreal verify IN.jsonl OUT.jsonl: grades a file of answers, keeps its fields and its order, prints what came out."""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from oreal_megatron import config
from oreal_megatron.records import Outcome, Verdict
from oreal_megatron.verify import VERSION
from oreal_megatron.verify.grader import Grader, JudgesDown
from oreal_megatron.verify.worker_pool import PoolBroken

WINDOW = 1000  # lines under way at once: memory stays small for a file of any length
SHOWN_KINDS = 12  # with more, only those with an error are listed
EXCLUDED = "convention"  # such kinds are graded, and left out of the accuracy: reasonable people differ on them
BAD_INPUT, STOPPED = 2, 3  # exit codes
console = Console(stderr=True, soft_wrap=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `oreal verify`."""
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
        "--judge", nargs="+", default=[], metavar="URL", help="OpenAI-compatible hosts, asked where rules say wrong"
    )
    parser.add_argument("--judge-model", default="", metavar="NAME", help="default: the first model a host names")
    parser.add_argument("--judge-cache", default="", metavar="FILE", help="verdicts of the judge, kept from run to run")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 done, 2 bad input, 3 stopped (the judges are down, or no worker starts)."""
    if (complaint := _complaint(args)) is not None:
        _say(complaint)
        return BAD_INPUT
    judge = config.JudgeConfig(urls=tuple(args.judge), model=args.judge_model, cache=args.judge_cache)
    settings = config.VerifyConfig(workers=args.workers, timeout_s=args.timeout, judge=judge)
    summary = Summary()
    try:
        with (
            Grader(settings) as grader,
            args.input.open("rb") as lines,
            args.output.open("w") as out,
            _progress() as bar,
        ):
            task = bar.add_task("grading", total=_count_lines(args.input))
            for line in _graded(grader, lines):
                out.write(json.dumps(line.written()) + "\n")
                summary.add(line)
                bar.advance(task)
    except (JudgesDown, PoolBroken) as stopped:
        _say(f"{stopped}. {args.output} holds the answers graded so far")
        return STOPPED
    summary.show(Console(soft_wrap=True))
    return 0


def _say(sentence: str) -> None:
    console.print(f"oreal verify: {sentence}", style="yellow", highlight=False, markup=False)


def _complaint(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, as a sentence; None when nothing is."""
    if not args.input.is_file():
        return f"{args.input} is not a file; give a JSONL file with `gold` and `pred` (or `response`) on each line"
    if args.output.exists() and args.output.samefile(args.input):
        return f"the output {args.output} is the input; give another name"
    if not args.output.parent.is_dir():
        return f"the folder {args.output.parent} of the output does not exist; make it first"
    if args.workers < 1 or args.timeout <= 0:
        return f"--workers must be at least 1 and --timeout above 0, got {args.workers} and {args.timeout:g}"
    if bad := [url for url in args.judge if not url.startswith(("http://", "https://"))]:
        return f"{bad[0]!r} is no URL of a judge; write http://host:port"
    return None


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def _count_lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


@dataclass
class Line:
    """One line of the input on its way."""

    number: int  # from 1
    fields: dict[str, Any]
    complaint: str = ""  # why it cannot be graded
    future: Future[Verdict] | None = None
    verdict: Verdict = field(default=Verdict(Outcome.UNKNOWN, "error"))

    def written(self) -> dict[str, Any]:
        verdict = self.verdict
        added = {"verdict": verdict.outcome.value, "method": verdict.method, "extracted": verdict.extracted}
        complaint = {"error": self.complaint} if self.complaint else {}
        return {**self.fields, **added, "seconds": round(verdict.seconds, 6), **complaint}


def _graded(grader: Grader, lines: IO[bytes]) -> Iterator[Line]:
    """Lines with their verdicts, in the order of the file, at most WINDOW of them under way."""
    waiting: deque[Line] = deque()
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        waiting.append(_submitted(grader, _read(number, raw)))
        if len(waiting) >= WINDOW:
            yield _settled(waiting.popleft())
    while waiting:
        yield _settled(waiting.popleft())


def _read(number: int, raw: bytes) -> Line:
    """The line, or what is wrong with it."""
    try:
        fields = json.loads(raw)
    except ValueError as error:  # UnicodeDecodeError is one too
        return Line(number, {"line": number}, f"line {number} is not JSON: {error}")
    if not isinstance(fields, dict):
        return Line(number, {"line": number}, f"line {number} holds a {type(fields).__name__}, wanted an object")
    answer = "pred" if "pred" in fields else "response"
    if missing := [name for name in ("gold", answer) if not isinstance(fields.get(name), (str, int, float))]:
        return Line(
            number, fields, f"line {number} needs text in `gold` and in `pred` or `response`; look at `{missing[0]}`"
        )
    return Line(number, fields)


def _submitted(grader: Grader, line: Line) -> Line:
    if line.complaint:
        _say(line.complaint)
        return line
    gold, question = str(line.fields["gold"]), str(line.fields.get("question", ""))
    if "pred" in line.fields:
        line.future = grader.submit_text(gold, str(line.fields["pred"]), question)
    else:
        line.future = grader.submit(
            gold, str(line.fields["response"]), bool(line.fields.get("finished", True)), question
        )
    return line


def _settled(line: Line) -> Line:
    if line.future is not None:
        line.verdict = line.future.result()
    return line


class Summary:
    """Counts and times, and with labels what was right about them."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.methods: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.kinds: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, line: Line) -> None:
        outcome = line.verdict.outcome
        self.outcomes[outcome.value] += 1
        self.methods[line.verdict.method] += 1
        if line.complaint:
            return
        self.seconds.append(line.verdict.seconds)
        label = line.fields.get("label")
        if label is None:
            return
        kind = self.kinds[str(line.fields.get("kind", "all"))]
        kind["pairs"] += 1
        kind["right"] += outcome is (Outcome.CORRECT if label else Outcome.INCORRECT)
        kind["false accepts"] += outcome is Outcome.CORRECT and not label
        kind["false rejects"] += outcome is not Outcome.CORRECT and bool(label)

    def show(self, console: Console) -> None:
        say = partial(console.print, highlight=False)
        total = sum(self.outcomes.values())
        counts = ", ".join(f"{self.outcomes[outcome.value]} {outcome.value}" for outcome in Outcome)
        unknown = self.outcomes["unknown"] / max(total, 1)
        say(f"{total} answers: {counts} (unknown {unknown:.2%}), verifier version {VERSION}")
        say("decided by " + ", ".join(f"{name} {n}" for name, n in self.methods.most_common()))
        if self.seconds:
            median, p99, worst = statistics.median(self.seconds), _percentile(self.seconds, 0.99), max(self.seconds)
            say(f"per answer: median {median * 1e3:.3f} ms, p99 {p99 * 1e3:.2f} ms, worst {worst:.3f} s")
        counted = [kind for name, kind in self.kinds.items() if not name.startswith(EXCLUDED)]
        if (whole := sum(counted, Counter()))["pairs"]:
            say(f"kinds other than {EXCLUDED}: {', '.join(_errors(whole))}")
        if self.kinds:
            self._show_kinds(console)

    def _show_kinds(self, console: Console) -> None:
        """Every kind where there are few, else the kinds with an error."""
        table = Table("kind", "pairs", "accuracy", "false accepts", "false rejects")
        for name in sorted(self.kinds):
            kind = self.kinds[name]
            if kind["right"] < kind["pairs"] or len(self.kinds) <= SHOWN_KINDS:
                table.add_row(name, *(text.split()[-1] for text in _errors(kind)))
        if table.row_count:
            console.print(table)
        if hidden := len(self.kinds) - table.row_count:
            console.print(f"{hidden} kinds without an error are not listed", highlight=False)


def _errors(kind: Counter[str]) -> list[str]:
    accuracy = f"accuracy {kind['right'] / kind['pairs']:.2%}"
    return [
        f"pairs {kind['pairs']}",
        accuracy,
        *(f"{name} {kind[name]}" for name in ("false accepts", "false rejects")),
    ]


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
