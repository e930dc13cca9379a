"""Grade the answers of a JSONL file, in its order, with memory that does not grow with the file."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from oreal_megatron.records import Outcome, Verdict
from oreal_megatron.verify.grader import Grader

WINDOW = 1000  # lines submitted at once: memory stays small for a file of any length


@dataclass
class FileLine:
    """One line of the input, and its verdict once there is one."""

    fields: dict[str, Any]
    error: str = ""  # why the line cannot be graded
    future: Future[Verdict] | None = None
    verdict: Verdict = Verdict(Outcome.UNKNOWN, "error")

    def output(self) -> dict[str, Any]:
        """Return the fields of the output line: those of the input, and the verdict."""
        verdict = self.verdict
        added = {"verdict": verdict.outcome.value, "method": verdict.method, "extracted": verdict.extracted}
        error = {"error": self.error or verdict.reason} if self.error or verdict.reason else {}
        return {**self.fields, **added, "seconds": round(verdict.seconds, 6), **error}


def read_line(number: int, raw: bytes) -> FileLine:
    """Parse line `number` of the file, counted from 1; a line that cannot be graded holds the error."""
    try:
        fields = json.loads(raw)
    except ValueError as error:  # UnicodeDecodeError is one too
        return FileLine({"line": number}, f"line {number} is not JSON: {error}")
    if not isinstance(fields, dict):
        return FileLine({"line": number}, f"line {number} holds a {type(fields).__name__}, expected an object")
    answer = "pred" if "pred" in fields else "response"
    missing = [name for name in ("gold", answer) if not isinstance(fields.get(name), (str, int, float))]
    if missing:
        needs = f"line {number} needs text in `gold` and in `pred` or `response`"
        return FileLine(fields, f"{needs}; fix `{missing[0]}`")
    return FileLine(fields)


def grade_lines(grader: Grader, lines: Iterable[bytes], report: Callable[[str], None]) -> Iterator[FileLine]:
    """Yield the lines with their verdicts, in order; `report` is called with the error of each line that has one."""
    pending: deque[FileLine] = deque()
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        line = read_line(number, raw)
        if line.error:
            report(line.error)
        else:
            line.future = _submit(grader, line.fields)
        pending.append(line)
        if len(pending) >= WINDOW:
            yield _with_verdict(pending.popleft())
    while pending:
        yield _with_verdict(pending.popleft())


def _submit(grader: Grader, fields: dict[str, Any]) -> Future[Verdict]:
    """Submit `pred` as the text of a file, `response` as a response of the policy."""
    gold, question = str(fields["gold"]), str(fields.get("question", ""))
    if "pred" in fields:
        return grader.submit_text(gold, str(fields["pred"]), question)
    return grader.submit(gold, str(fields["response"]), bool(fields.get("finished", True)), question)


def _with_verdict(line: FileLine) -> FileLine:
    if line.future is not None:
        line.verdict = line.future.result()
    return line
