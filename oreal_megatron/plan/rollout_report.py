"""Table, picture and JSON values of the rollout simulation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from oreal_megatron.observe.tables import add_columns, simple_table
from oreal_megatron.plan import rollout_simulation
from oreal_megatron.plan.estimate import Estimate
from oreal_megatron.plan.report_tables import print_text
from oreal_megatron.plan.response_lengths import LengthSource, LogNormalLengths, RunLengths
from oreal_megatron.plan.rollout_simulation import PolicyResult


def length_source(plan: Estimate, run: str) -> LengthSource:
    """Return the lengths of a run folder's rollouts, or without one the assumed log-normal distribution."""
    if run:
        return RunLengths.of_run(Path(run))
    assumed = plan.scenario.assumed
    cap = plan.scenario.config.sampling.max_new_tokens
    return LogNormalLengths.with_mean(assumed.response_tokens, assumed.length_sigma, assumed.length_prompt_share, cap)


def simulate(plan: Estimate, run: str, console: Console) -> list[PolicyResult]:
    """Simulate every policy and print the results; `run`: a run folder whose response lengths are used, or ""."""
    lengths = length_source(plan, run)
    other_s = plan.step_seconds - plan.seconds["generate"]
    outcomes = rollout_simulation.compare(plan.scenario, other_s, lengths)
    table = simple_table("\ngeneration by policy (simulated, mean of a step)")
    add_columns(
        table, "policy", "gen\ns", "step\ns", "idle\n%", "active", "lost\n%", "length", "stale", "tokens/s\n/GPU", "x"
    )
    for outcome in outcomes:
        table.add_row(
            outcome.policy.name, f"{outcome.generation_s:.0f}", f"{outcome.step_s:.0f}",
            f"{100 * outcome.idle_share:.0f}", f"{outcome.mean_active:.1f}", f"{100 * outcome.aborted_share:.0f}",
            f"{outcome.length_ratio:.2f}", f"{outcome.staleness:.1f}", f"{outcome.tokens_per_gpu_second:.0f}",
            f"{outcome.tokens_per_gpu_second / outcomes[0].tokens_per_gpu_second:.2f}",
        )  # fmt: skip
    console.print(table)
    print_text(console, f"{lengths.describe()}. {other_s:.0f} s of a step beside generation are those of the plan.")
    print_text(
        console,
        "idle: share of the replicas' time in generation without a rollout; active: rollouts of a replica at once; "
        "lost: tokens of aborted rollouts; length: of trained rollouts, against all that were asked for; stale: mean "
        "steps between the first token of a prompt and its training; x: tokens/s/GPU against the first row.",
    )
    return outcomes


def as_dict(outcome: PolicyResult) -> dict[str, Any]:
    """Return an outcome as JSON values, without its timelines."""
    values = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)}
    del values["timelines"]
    return values | {"policy": dataclasses.asdict(outcome.policy)}


def draw(outcomes: Sequence[PolicyResult], path: Path) -> None:
    """Draw for each policy how many rollouts each replica decodes at once, over the last simulated step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    longest = max(outcome.generation_s for outcome in outcomes) * 1.15
    most = max(count for outcome in outcomes for line in outcome.timelines for _, count in line)
    figure, panels = plt.subplots(
        len(outcomes), sharex=True, figsize=(9, 1.15 * len(outcomes) + 0.8), squeeze=False, layout="constrained"
    )
    times = np.linspace(0, longest, 600)
    for axes, outcome in zip(panels[:, 0], outcomes, strict=True):
        rows = np.zeros((len(outcome.timelines), len(times)))
        for row, line in zip(rows, outcome.timelines, strict=True):
            moments, counts = zip(*line, strict=True)
            row[:] = np.array([0, *counts])[np.searchsorted(moments, times, side="right")]
        image = axes.imshow(
            np.ma.masked_equal(rows, 0), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=most,
            extent=(0, longest, len(rows), 0),
        )  # fmt: skip
        axes.set_title(f"{outcome.policy.name}: {outcome.generation_s:.0f} s", fontsize=9, loc="left")
        axes.set(yticks=[], ylabel="replicas")
    panels[-1, 0].set_xlabel("seconds of generation in one step; white: idle")
    figure.colorbar(image, ax=panels[:, 0].tolist(), label="rollouts at once", fraction=0.03)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
