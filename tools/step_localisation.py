"""Measure how well scores and weights of the reward model point at wrong steps, in runs on the checked task.

    python tools/step_localisation.py runs/checked/oreal

reads rollouts and dumps of each step. In incorrect rollouts, the digit of the first wrong step is compared with the
digits of the right steps before it: `score` is the chance (ROC AUC) that it has the lower score, `weight` that it has
the higher weight, `rollout` that a correct rollout has a higher mean score than an incorrect one. Means over steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import checked_steps
from safetensors.torch import load_file
from torch import Tensor

from oreal_megatron.observe.rows import read_rows


@dataclass(frozen=True)
class TrainedRollout:
    """A rollout that a step was trained on; scores and weights of its tokens are empty where the run has none."""

    question: str
    response: str
    is_correct: bool
    scores: list[float]
    weights: list[float]


def read_step(run: Path, step: int) -> Iterator[TrainedRollout]:
    """Yield the rollouts that a step of a run was trained on."""
    rows = {(row["slot"], row["index"]): row for row in read_rows(run / "rollouts" / f"step_{step:06d}.jsonl")}
    for file in sorted((run / "dumps" / f"step_{step:06d}").glob("share_*.safetensors")):
        tensors = load_file(file)
        for number in sorted({name.split("/")[0] for name in tensors}):
            part = {name.split("/")[1]: value for name, value in tensors.items() if name.startswith(f"{number}/")}
            yield from _read_micro_batch(part, rows)


def _read_micro_batch(part: dict[str, Tensor], rows: dict[tuple[int, int], dict]) -> Iterator[TrainedRollout]:
    offsets = part["action_offsets"].tolist()
    for number, key in enumerate(map(tuple, part["rollouts"].tolist())):
        if key not in rows:  # padding of an empty micro-batch
            continue
        tokens = slice(offsets[number], offsets[number + 1])
        values = {name: part[name][tokens].tolist() if name in part else [] for name in ("score", "weight")}
        row = rows[key]
        is_correct = row["verdict"] == "correct"
        yield TrainedRollout(row["question"], row["response"], is_correct, values["score"], values["weight"])


def auc(higher: Sequence[float], lower: Sequence[float]) -> float | None:
    """Return the chance that a value of the first group is above one of the second, ties half; None if one is empty."""
    wins = sum((a > b) + (a == b) / 2 for a in higher for b in lower)
    return wins / (len(higher) * len(lower)) if higher and lower else None


def localisation(rollouts: Sequence[TrainedRollout]) -> dict[str, float | None]:
    """Return the three figures of one step; None where a group is empty or the run has no such values."""
    first: dict[str, list[float]] = {"score": [], "weight": []}
    before: dict[str, list[float]] = {"score": [], "weight": []}
    for rollout in rollouts:
        wrong = checked_steps.first_wrong_step(rollout.question, rollout.response)
        if rollout.is_correct or wrong is None:
            continue
        right = [step.position for step in checked_steps.read_steps(rollout.question, rollout.response)]
        for name, values in (("score", [-score for score in rollout.scores]), ("weight", rollout.weights)):
            first[name] += values[wrong : wrong + 1]
            before[name] += [values[position] for position in right if position < wrong] if values else []
    means = {
        is_correct: [
            statistics.fmean(rollout.scores)
            for rollout in rollouts
            if rollout.is_correct == is_correct and rollout.scores
        ]
        for is_correct in (True, False)
    }
    return {name: auc(first[name], before[name]) for name in first} | {"rollout": auc(means[True], means[False])}


def of_run(run: Path, first_step: int = 10) -> dict[str, float | None]:
    """Return the means of the figures over the steps from `first_step`, when a zero head has learnt something."""
    steps = [int(folder.name.split("_")[1]) for folder in sorted((run / "dumps").glob("step_*"))]
    figures = [localisation(list(read_step(run, step))) for step in steps if step >= first_step]
    values = {name: [row[name] for row in figures if row[name] is not None] for name in ("score", "weight", "rollout")}
    return {name: statistics.fmean(numbers) if numbers else None for name, numbers in values.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--first-step", type=int, default=10)
    args = parser.parse_args()
    for run in args.runs:
        print(json.dumps({"run": str(run), **of_run(run, args.first_step)}))


if __name__ == "__main__":
    main()
