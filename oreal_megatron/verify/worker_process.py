"""One grading process: reads answers as JSON lines, writes results as JSON lines. Never imports torch.

worker_pool.py starts it as `python -m oreal_megatron.verify.worker_process` and kills it when an answer takes too long
or too much memory. The timer below ends it only if that parent process has died.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Sequence

from oreal_megatron.math_equality import rules

ORPHAN_S = 60.0  # processor seconds on one answer after which the kernel ends a worker without a parent
MAX_EXTRACTED = 2000  # characters of the answer that are returned


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


def main() -> None:
    """Grade lines of the standard input until it closes."""
    sys.setrecursionlimit(3000)
    out = sys.stdout.buffer
    rules.grade("\\frac{1}{2}", "\\boxed{\\sqrt{2}^{-2}}")  # the first comparison is slow: it comes before "ready"
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_VIRTUAL, ORPHAN_S)
        start = time.perf_counter()
        outcome, method, extracted = grade(*json.loads(line))
        seconds = time.perf_counter() - start
        out.write(json.dumps([outcome, method, extracted and extracted[:MAX_EXTRACTED], seconds]).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
