"""This verifier beside math-verify 0.9.0 on the same labelled pairs, in one run:

    pip install math-verify==0.9.0
    python tools/compare_math_verify.py ../shared/data/grading_pairs.jsonl

Each side runs warm in one process of its own, with its usual limits: ours unguarded (its rules are bounded by
themselves), math-verify with its own 5 s alarms for parsing and for comparing. Kinds that begin with "convention" are
left out. Prints accuracy, false accepts, false rejects, and the time per pair.
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

from rich.console import Console
from rich.table import Table


def ours() -> Callable[[dict], bool]:
    from oreal_megatron.math_equality import rules

    return lambda row: rules.grade_text(row["gold"], row["pred"]).outcome == "correct"


def math_verify() -> Callable[[dict], bool]:
    """As its authors call it: a bare answer goes in a box, a gold in dollars."""
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
    """Warms up on the first hundred pairs, then grades all of them with a clock."""
    call = make()
    for row in rows[:100]:
        call(row)
    accepts = rejects = 0
    seconds = []
    for row in rows:
        start = time.perf_counter()
        right = call(row)
        seconds.append(time.perf_counter() - start)
        accepts += right and not row["label"]
        rejects += not right and bool(row["label"])
    out.put((accepts, rejects, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="JSONL with gold, pred, label, kind, form")
    path = parser.parse_args().pairs
    rows = [row for row in map(json.loads, path.open("rb")) if not row["kind"].startswith("convention")]
    table = Table(
        "verifier", "pairs", "accuracy", "false accepts", "false rejects", "median ms", "p99 ms", "worst s", "MB"
    )
    context = multiprocessing.get_context("fork")  # both sides start from the same warm interpreter
    for name, make in (("oreal verify (rules)", ours), ("math-verify", math_verify)):
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
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
