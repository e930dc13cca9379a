"""Compare the rules with math-verify 0.9.0 on the same labelled pairs, in one run:

    pip install math-verify==0.9.0
    python tools/compare_math_verify.py ../shared/data/grading_pairs.jsonl

Each side runs warm in a process of its own with its usual limits: the rules without any (their work is bounded),
math-verify with its 5 s alarms for parsing and for comparing. Kinds that begin with "convention" are left out. Prints
accuracy, false accepts, false rejects and the time per pair.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table


def grade_by_rules() -> Callable[[dict], bool]:
    """Return the grader of this project, without worker processes."""
    from oreal_megatron.math_equality import rules

    return lambda row: rules.grade_text(row["gold"], row["pred"]).outcome == "correct"


def grade_by_math_verify() -> Callable[[dict], bool]:
    """Return math-verify as its authors call it: a bare answer goes in a box, a gold in dollars."""
    from math_verify import parse, verify

    def call(row: dict) -> bool:
        gold = row["gold"].strip().strip("$").strip()
        if gold.startswith("\\boxed{") and gold.endswith("}"):
            gold = gold[len("\\boxed{") : -1]
        text = (
            f"\\boxed{{{row['pred']}}}" if row.get("form") == "answer" and "\\boxed" not in row["pred"] else row["pred"]
        )
        return bool(verify(parse(f"${gold}$"), parse(text)))

    return call


def measure(make: Callable[[], Callable[[dict], bool]], rows: list[dict], out: multiprocessing.Queue) -> None:
    """Warm up on the first hundred pairs, then grade and time all of them."""
    call = make()
    for row in rows[:100]:
        call(row)
    accepts = rejects = 0
    seconds = []
    for row in rows:
        start = time.perf_counter()
        correct = call(row)
        seconds.append(time.perf_counter() - start)
        accepts += correct and not row["label"]
        rejects += not correct and bool(row["label"])
    out.put((accepts, rejects, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main() -> None:
    """Measure both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="JSONL with gold, pred, label, kind, form")
    path = parser.parse_args().pairs
    rows = [row for row in map(json.loads, path.open("rb")) if not row["kind"].startswith("convention")]
    names = ("pairs", "accuracy", "false accepts", "false rejects", "median ms", "p99 ms", "worst s", "MB")
    table = Table("verifier", *names, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    context = multiprocessing.get_context("fork")  # both sides start from the same warm interpreter
    for name, make in (("rules", grade_by_rules), ("math-verify", grade_by_math_verify)):
        queue = context.Queue()
        process = context.Process(target=measure, args=(make, rows, queue))
        process.start()
        accepts, rejects, seconds, memory = queue.get()
        process.join()
        times = [statistics.median(seconds) * 1e3, sorted(seconds)[int(0.99 * len(seconds))] * 1e3]
        accuracy = f"{1 - (accepts + rejects) / len(rows):.2%}"
        cells = (
            len(rows),
            accuracy,
            accepts,
            rejects,
            f"{times[0]:.3f}",
            f"{times[1]:.2f}",
            f"{max(seconds):.2f}",
            f"{memory:.0f}",
        )
        table.add_row(name, *map(str, cells))
    Console().print(table)


if __name__ == "__main__":
    main()
