"""One grading process: reads answers as JSON lines, writes results as JSON lines. Never imports torch itself.

worker_pool.py starts it as `python -m oreal_megatron.verify.worker_process` and kills it when an answer takes too long
or too much memory. The timer below ends it only if that parent process has died. With an argument, the name of a user's
function, that function grades. Whatever it prints goes nowhere, and its standard input is empty: both pipes are ours.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

from oreal_megatron.config.user_functions import read_function
from oreal_megatron.math_equality import rules

UserFunction = Callable[[dict[str, Any], str], object]
ORPHAN_S = 60.0  # processor seconds on one answer after which the kernel ends a worker without a parent
MAX_EXTRACTED = 2000  # characters of the answer that are returned


class Decision(NamedTuple):
    """Outcome with its method; the reason of an unknown one; the reward if it is a number."""

    outcome: str
    method: str
    reason: str = ""
    reward: float | None = None


def grade(kind: str, gold: str, text: str, finished: bool, thinking_end: Sequence[str]) -> rules.Graded:
    """Grade one answer; `kind` is "response", "text" or "itself". An exception of the rules is the method "error"."""
    try:
        if kind == "text":
            return rules.grade_text(gold, text)
        if kind == "itself":
            return rules.Graded("correct" if rules.equals_itself(gold) else "incorrect", "exact", gold)
        return rules.grade(gold, text, finished, tuple(thinking_end))
    except MemoryError:
        raise  # the memory limit: this process ends and is replaced
    except Exception:  # a fault of the rules must not stop a run: the answer is unknown, and counted
        return rules.Graded("unknown", "error", None)


def call(function: UserFunction, row: str, response: str) -> Decision:
    """Return what a user's function decides: True, False, None for unknown, or a reward whose sign is the outcome."""
    try:
        returned = function(json.loads(row), response)
    except MemoryError:
        raise
    except Exception as error:  # the user's function may do anything: the rollout is unknown, and counted
        return Decision("unknown", "error", f"verify.function failed: {type(error).__name__}: {error}"[:MAX_EXTRACTED])
    if returned is None:
        return Decision("unknown", "function", "verify.function returned None")
    if isinstance(returned, bool):
        return Decision("correct" if returned else "incorrect", "function")
    if isinstance(returned, float) and 0 < abs(returned) <= 1:
        return Decision("correct" if returned > 0 else "incorrect", "function", reward=returned)
    expected = "expected True, False, None for unknown, or a float from -1 to 1 that is not 0"
    return Decision("unknown", "error", f"verify.function returned {returned!r:.200}; {expected}")


def main() -> None:
    """Grade lines of the standard input until it closes."""
    sys.setrecursionlimit(3000)
    tasks, out = _own_pipes()
    function = read_function(sys.argv[1], "verify.function", ("row", "response")) if len(sys.argv) > 1 else None
    rules.grade("\\frac{1}{2}", "\\boxed{\\sqrt{2}^{-2}}")  # the first comparison is slow: it comes before "ready"
    out.write(b"ready\n")
    out.flush()
    for line in tasks:
        signal.setitimer(signal.ITIMER_VIRTUAL, ORPHAN_S)
        start = time.perf_counter()
        kind, gold, text, finished, thinking_end = json.loads(line)
        if function:
            extracted, decision = None, call(function, gold, text)
        else:
            outcome, method, extracted = grade(kind, gold, text, finished, thinking_end)
            decision = Decision(outcome, method)
        seconds = time.perf_counter() - start
        short = extracted and extracted[:MAX_EXTRACTED]
        result = [decision.outcome, decision.method, short, seconds, decision.reason, decision.reward]
        out.write(json.dumps(result).encode() + b"\n")
        out.flush()


def _own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return both pipes to the parent process, which nothing else in this process reads or writes from now on."""
    tasks, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    return tasks, out


if __name__ == "__main__":
    main()
