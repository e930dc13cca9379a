"""Print the verifier's figures on a folder of test data, as docs/reference/verifier.md shows them:

    python tools/verifier_figures.py ../shared/data

Golds that equal themselves; a step of 1,024 rollouts with 5 % hostile ones; hostile answers (code that ran, items over
the time limit, wrong ones accepted, memory of the workers). Accuracy and time on labelled pairs are printed by
`oreal verify` and, beside math-verify, by tools/compare_math_verify.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

from oreal_megatron import config
from oreal_megatron.records import Outcome, Verdict
from oreal_megatron.verify.grader import Grader

SETS = (
    "math500",
    "gsm8k_train",
    "gsm8k_test",
    "aime2024",
    "aime2025",
    "aime_1983_2023",
    "amc23",
    "olympiadbench_math_en",
)
STEP, HOSTILE = 1024, 51


def rows(folder: Path, name: str) -> list[dict]:
    """Return the rows of one JSONL file of the folder."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_bytes().splitlines()]


def golds(folder: Path, grader: Grader) -> None:
    """Print how many gold answers of each data set equal themselves."""
    for name in SETS:
        answers = [str(row["answer"]) for row in rows(folder, name)]
        verdicts = [future.result() for future in [grader.equals_itself(answer) for answer in answers]]
        same = sum(verdict.outcome is Outcome.CORRECT for verdict in verdicts)
        print(f"golds of {name}: {same} of {len(answers)} equal themselves")


def hostile(folder: Path, settings: config.VerifyConfig) -> None:
    """Grade each hostile string bare and in a box, by workers in an empty folder where a payload would leave a file."""
    answers = rows(folder, "evil_answers")
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        start = time.monotonic()
        with Grader(settings) as grader:
            bare = [grader.submit_text(row["gold"], row["answer"]) for row in answers]
            boxed = [grader.submit(row["gold"], f"\\boxed{{{row['answer']}}}") for row in answers]
            verdicts = [(row, future.result()) for row, future in zip(answers * 2, bare + boxed, strict=True)]
            wall = time.monotonic() - start
            pids = grader.worker_pids()
            children = sum(len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) for pid in pids)
            memory = max(_peak_mb(pid) for pid in pids)
        markers = len(os.listdir(empty))
        os.chdir("/")
    _print_hostile(verdicts, settings, wall)
    print(f"  marker files {markers}, child processes {children}, largest worker {memory:.0f} MB")


def _print_hostile(verdicts: list[tuple[dict, Verdict]], settings: config.VerifyConfig, wall: float) -> None:
    late = sum(verdict.seconds > settings.timeout_s + 0.5 for _, verdict in verdicts)
    accepted = sum(_accepted(verdict) and row["expect"].startswith("reject") for row, verdict in verdicts)
    unknown = sum(verdict.outcome is Outcome.UNKNOWN for _, verdict in verdicts)
    slowest = max(verdict.seconds for _, verdict in verdicts)
    print(f"hostile answers: {len(verdicts)} graded in {wall:.2f} s by {settings.workers} workers")
    print(f"  false accepts {accepted}, over the limit + 0.5 s {late}, unknown {unknown}, slowest {slowest:.3f} s")


def step(folder: Path, settings: config.VerifyConfig) -> None:
    """Grade 1,024 responses as a policy writes them: golds of MATH-500 behind some reasoning, and hostile answers."""
    chance = random.Random(0)
    equal = [
        (answer, answer)
        for answer in chance.choices([row["answer"] for row in rows(folder, "math500")], k=STEP - HOSTILE)
    ]
    different = [(row["gold"], row["answer"]) for row in chance.choices(rows(folder, "evil_answers"), k=HOSTILE)]
    mixed = chance.sample(equal + different, STEP)
    with Grader(settings) as grader:
        start = time.monotonic()
        futures = [grader.submit(gold, f"{'some reasoning ' * 400}\\boxed{{{answer}}}") for gold, answer in mixed]
        verdicts = [future.result() for future in futures]
        wall = time.monotonic() - start
    correct = sum(map(_accepted, verdicts))
    print(
        f"a step of {STEP} rollouts, {HOSTILE} hostile: {wall:.2f} s with {settings.workers} workers, {correct} correct"
    )


def _accepted(verdict: Verdict) -> bool:
    return verdict.outcome is Outcome.CORRECT


def _peak_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with math500.jsonl ... and evil_answers.jsonl")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    folder, settings = args.folder.resolve(), config.VerifyConfig(workers=args.workers)
    with Grader(settings) as grader:
        golds(folder, grader)
    step(folder, settings)
    hostile(folder, settings)


if __name__ == "__main__":
    main()
