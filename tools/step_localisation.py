"""Measure how well scores and weights of the reward model point at wrong steps, in runs on the checked task.

    python tools/step_localisation.py runs/checked/quickstart

reads the rollouts and dumps of each step. In incorrect rollouts, the digit of the first wrong step is compared with the
digits of the right steps before it: `score` is the chance (ROC AUC) that it has the lower score, `weight` that it has
the higher weight; `rollout` is the chance that a correct rollout has a higher mean score than an incorrect one. The
figures are means over steps.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import checked_steps

from oreal_megatron.observe.dumped_samples import WeighedResponse, responses_of
from oreal_megatron.observe.dumps import read_dump
from oreal_megatron.runtime import rollout_files


@dataclass(frozen=True)
class TextWithWeights:
    """A response that a step was trained on: its text, and the reward model's view of its tokens."""

    question: str
    text: str
    tokens: WeighedResponse

    @property
    def is_aligned(self) -> bool:
        """True if positions in the text are those of tokens: no special token was sampled but the last."""
        return len(self.text) in (len(self.tokens.tokens) - 1, len(self.tokens.tokens))


def read_step(run: Path, step: int) -> list[TextWithWeights]:
    """Return the responses that a step of a run was trained on; none if its dump has no scores."""
    written = rollout_files.read(rollout_files.complete_steps(run).get(step, []))
    rows = {(row["slot"], row["index"]): row for _, row in written}
    return [
        TextWithWeights(row["question"], row["response"], tokens)
        for tokens in responses_of(read_dump(run / "dumps" / f"step_{step:06d}"))
        for row in [rows[tokens.slot, tokens.index]]
    ]


def auc(higher: Sequence[float], lower: Sequence[float]) -> float | None:
    """Return the chance that a value of the first group is above one of the second, ties half; None if one is empty."""
    wins = sum((a > b) + (a == b) / 2 for a in higher for b in lower)
    return wins / (len(higher) * len(lower)) if higher and lower else None


def localisation(responses: Sequence[TextWithWeights]) -> dict[str, float | None]:
    """Return the three figures of one step; None where a group is empty."""
    at_first: dict[str, list[float]] = {"score": [], "weight": []}
    before: dict[str, list[float]] = {"score": [], "weight": []}
    for response in responses:
        wrong = checked_steps.first_wrong_step(response.question, response.text)
        if response.tokens.correct or wrong is None or not response.is_aligned:
            continue
        digits = [step.position for step in checked_steps.read_steps(response.question, response.text)]
        values = {"score": [-score for score in response.tokens.scores], "weight": response.tokens.weights}
        for name, value_T in values.items():
            at_first[name].append(value_T[wrong])
            before[name] += [value_T[position] for position in digits if position < wrong]
    means = [(response.tokens.correct, statistics.fmean(response.tokens.scores)) for response in responses]
    rollout = auc([mean for correct, mean in means if correct], [mean for correct, mean in means if not correct])
    return {name: auc(at_first[name], before[name]) for name in at_first} | {"rollout": rollout}


def of_run(run: Path, first_step: int = 10) -> dict[str, float | None]:
    """Return the means of the figures over the steps from `first_step`, before which a zero head has learnt little."""
    steps = [int(folder.name.split("_")[1]) for folder in sorted((run / "dumps").glob("step_*"))]
    figures = [localisation(read_step(run, step)) for step in steps if step >= first_step]
    values = {name: [row[name] for row in figures if row[name] is not None] for name in ("score", "weight", "rollout")}
    return {name: statistics.fmean(numbers) if numbers else None for name, numbers in values.items()}


def describe(figures: Mapping[str, float | None]) -> str:
    """Return the figures of a run as text."""
    if figures["score"] is None:
        return "no scores at wrong steps; it has no reward model, or no dumps"
    values = {name: "none" if value is None else f"{value:.3f}" for name, value in figures.items()}
    return (
        f"wrong steps found (ROC AUC, 0.5 is chance): {values['score']} by the score of the first wrong step, "
        f"{values['weight']} by its weight; incorrect rollouts found: {values['rollout']} by their mean score"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--first-step", type=int, default=10)
    args = parser.parse_args()
    for run in args.runs:
        print(f"{run}: {describe(of_run(run, args.first_step))}")


if __name__ == "__main__":
    main()
