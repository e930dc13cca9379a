"""Grade the answers of a JSONL file, in its order, with memory that does not grow with the file."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from oreal_megatron.records import Outcome, Verdict
from oreal_megatron.verify.grader import Grader

_LABELS = {"1": True, "true": True, "1.0": True, "0": False, "false": False, "0.0": False}
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
    except RecursionError:
        return FileLine({"line": number}, f"line {number} is nested too deeply to be read; expected a flat object")
    if not isinstance(fields, dict):
        return FileLine({"line": number}, f"line {number} holds a {type(fields).__name__}, expected an object")
    return FileLine(fields, _fault(number, fields))


def _fault(number: int, fields: dict[str, Any]) -> str:
    """Return why the fields of a line cannot be graded; empty where they can."""
    answer = "pred" if "pred" in fields else "response"
    for name in ("gold", answer):
        if not isinstance(fields.get(name), (str, int, float)):
            return f"line {number} needs text in `gold` and in `pred` or `response`; fix `{name}`"
        if isinstance(fields[name], float) and not math.isfinite(fields[name]):
            return f"line {number}: `{name}` is {fields[name]}, no JSON value; write null for a missing one, or a text"
    for name in ("gold", answer, "question"):
        try:
            str(fields.get(name, "")).encode()
        except UnicodeEncodeError:
            return f"line {number}: `{name}` holds half of a character (a lone surrogate); remove it"
    try:
        read_label(fields)
    except ValueError as error:
        return f"line {number}: {error}"
    return ""


def read_label(fields: dict[str, Any]) -> bool | None:
    """Return the label of a line: 1, 0, true, false, or such a text; None without one. Raises ValueError for others."""
    label = fields.get("label")
    if label is None:
        return None
    known = _LABELS.get(str(label).strip().lower())
    if known is None:
        raise ValueError(f"`label` is {label!r:.80}; expected 1 (the answer is the gold answer) or 0")
    return known


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
