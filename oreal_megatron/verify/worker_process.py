"""One grading process: reads answers as JSON lines, writes results as JSON lines. Never imports torch.

Started by pool.py as `python -m oreal_megatron.verify.worker_process`. It is killed from outside when it is late or too
big; the
timer below only ends it where the process that would do so has died.
"""

from __future__ import annotations

import json
import signal
import sys
import time

from oreal_megatron.math_equality import rules

ORPHAN_S = 60.0  # processor seconds on one answer after which the kernel ends a worker that nobody watches
MAX_EXTRACTED = 2000  # characters of the answer that go back


def grade(task: list) -> rules.Graded:
    """One task: [kind, gold, text, finished, thinking_end]. What the rules cannot do is an error."""
    kind, gold, text, finished, thinking_end = task
    try:
        if kind == "text":
            return rules.grade_text(gold, text)
        if kind == "itself":
            return rules.Graded("correct" if rules.equals_itself(gold) else "incorrect", "exact", gold)
        return rules.grade(gold, text, finished, tuple(thinking_end))
    except MemoryError:
        raise  # the memory cap: this process is no longer fit to grade; it ends and is replaced
    except Exception:  # a model's text found a hole in the rules: the item is UNKNOWN and counted, the run goes on
        return rules.Graded("unknown", "error", None)


def main() -> None:
    """Serves until the input closes."""
    sys.setrecursionlimit(3000)
    out = sys.stdout.buffer
    rules.grade("\\frac{1}{2}", "\\boxed{\\sqrt{2}^{-2}}")  # loads and warms everything before "ready"
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_VIRTUAL, ORPHAN_S)
        start = time.perf_counter()
        outcome, method, extracted = grade(json.loads(line))
        seconds = time.perf_counter() - start
        out.write(json.dumps([outcome, method, extracted and extracted[:MAX_EXTRACTED], seconds]).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
