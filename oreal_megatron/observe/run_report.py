"""Results of run folders: table of held-out accuracy, learning curve, summary."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from oreal_megatron.config import ConfigError
from oreal_megatron.observe.rows import Row, read_rows
from oreal_megatron.observe.tables import add_columns, simple_table
from oreal_megatron.runtime import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """Contents of one run folder."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[Row]
    evaluations: list[Row]
    starts: frozenset[int]  # first step after each start of the run

    @property
    def seconds(self) -> float | None:
        """Wall-clock seconds of all steps; None where none was measured."""
        measured = [row["seconds/step"] for row in self.metrics if "seconds/step" in row]
        return sum(measured) if measured else None

    @property
    def has_rollouts(self) -> bool:
        """True for a run of reinforcement learning, whose steps have rollouts."""
        return any(name.startswith(("rollout/", "reward/")) for row in self.metrics for name in row)

    @property
    def reward_model(self) -> str:
        """Use of the reward model in words; a run without rollouts was supervised, or trained the reward model."""
        if self.metrics and not self.has_rollouts:
            return "alone" if "loss/reward_model" in self.metrics[0] else "none, supervised"
        return "yes" if self.config["reward_model"]["enabled"] else "no"


def read_run(path: Path) -> RunRecord:
    """Read a run folder; raise ConfigError if it is not one."""
    for name in ("config.json", "metrics.jsonl"):
        if not (path / name).is_file():
            raise ConfigError(f"{path} is not a run folder: it has no {name}")
    return RunRecord(
        str(path),
        files.read_object(path / "config.json"),
        files.read_object(path / "environment.json"),
        read_rows(path / "metrics.jsonl"),
        [row for row in read_rows(path / "evaluations.jsonl") if "accuracy" in row],  # not those of a reward model
        frozenset({0, *(int(file.stem.rsplit("_", 1)[1]) for file in path.glob("config_before_step_*.json"))}),
    )


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return names for runs: their folders without the part that all share."""
    parts = [path.resolve().parts for path in paths]
    if len(parts) == 1:
        return ["/".join(parts[0][-2:])]
    shared = next((n for n, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), 0)
    return ["/".join(own[shared:]) or own[-1] for own in parts]


def curve_labels(names: Sequence[str]) -> list[str]:
    """Return the label of each run's curve; runs of one label share a colour.

    Seeds of several arms (`seed_0/oreal`, `seed_1/oreal`, `seed_0/sft`) are labelled by arm, other runs by name.
    """
    arms = [Path(name).name for name in names]
    return arms if 1 < len(set(arms)) < len(arms) else list(names)


def summary(record: RunRecord) -> dict[str, Any]:
    """Return settings and held-out accuracy of a run as JSON values."""
    first, last = _first_and_last(record)
    return {
        "accuracy_before": first["accuracy"],
        "accuracy_after": last["accuracy"],
        "interval_before": [first["low"], first["high"]],
        "interval_after": [last["low"], last["high"]],
        **_sampled_summary(first, last),
        "problems": last["answers"],
        "steps": len(record.metrics),
        "seed": record.config["seed"],
        "reward_model": record.config["reward_model"]["enabled"],
        **{name.replace("-", "_"): version for name, version in record.environment["imported"].items()},
    }


def closing(record: RunRecord) -> str:
    """Return what a finished run says last: where its policies are, how good they are, and what to look at next."""
    run = Path(record.name)
    lines = [f"policy: {run / 'policy'}{_accuracy_note(record)}"]
    if (run / "best").is_dir():
        key, name = _best_figure(record)
        best = max(record.evaluations, key=lambda row: row[key], default=None)
        figures = f" ({name} {best[key]:.1%} after step {best['step']})" if best else ""
        lines.append(f"best policy: {run / 'best'}{figures}")
    lines.append(f"next: oreal report {run} --html {run / 'report.html'}    # learning curves, rollouts, findings")
    return "\n".join(lines)


def _accuracy_note(record: RunRecord) -> str:
    """Return held-out accuracy after and before training in brackets; "" without evaluations."""
    if not record.evaluations:
        return ""
    first, last = _first_and_last(record)
    key, name = _best_figure(record)
    return f" ({name} {last[key]:.1%}, {first[key]:.1%} before training)"


def _best_figure(record: RunRecord) -> tuple[str, str]:
    """Return key and name of the accuracy by which policies are compared (EvaluationConfig.figure)."""
    if record.evaluations and _is_sampled(record):
        return "sampled_accuracy", "held-out accuracy of samples"
    return "accuracy", "held-out accuracy"


def print_table(records: Sequence[RunRecord]) -> None:
    """Print held-out accuracy before and after training, one line per run."""
    table = simple_table("\nheld-out accuracy with 95 % interval")
    add_columns(table, "run", "seed", "reward model", "mode", "before", "after", "gain (points)", "steps", "seconds")
    for record, name in zip(records, short_names([Path(record.name) for record in records]), strict=True):
        settings = [name, str(record.config["seed"]), record.reward_model]
        length = [steps_taken(record), "" if record.seconds is None else f"{record.seconds:.0f}"]
        if not record.evaluations:
            table.add_row(*settings, "not evaluated", "", "", "", *length)
            continue
        table.add_row(*settings, "greedy", *_accuracies(record), *length)
        if _is_sampled(record):
            table.add_row(*[""] * len(settings), "sampled", *_accuracies(record, "sampled_"), *[""] * len(length))
    Console().print(table)


def steps_taken(record: RunRecord) -> str:
    """Return the steps of a run, with those that an unfinished one should have."""
    taken, planned = len(record.metrics), record.config.get("steps", 0)
    return str(taken) if not record.has_rollouts or taken >= planned else f"{taken} of {planned}"


def draw(records: Sequence[RunRecord], path: Path) -> None:
    """Draw held-out accuracy with its 95 % band over steps, and the pass rate of rollouts where runs have them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trained_on_rollouts = any(record.has_rollouts for record in records)
    panels = 1 + trained_on_rollouts
    figure, all_axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4.2), sharey=True, squeeze=False)
    labels = curve_labels(short_names([Path(record.name) for record in records]))
    counts = collections.Counter(labels)
    palette = plt.get_cmap("tab10" if len(counts) <= 10 else "tab20").colors
    colours = dict(zip(counts, itertools.cycle(palette)))
    for label, count in counts.items():
        all_axes[0, 0].plot([], [], color=colours[label], label=f"{label} ({count} runs)" if count > 1 else label)
    for record, label in zip(records, labels, strict=True):
        colour = colours[label]
        _draw_accuracy(record, all_axes[0, 0], colour)
        if trained_on_rollouts:
            rows = [row for row in record.metrics if "reward/pass_rate" in row]
            rates = [row["reward/pass_rate"] for row in rows]
            all_axes[0, 1].plot([row["step"] for row in rows], rates, linewidth=0.9, color=colour)
            all_axes[0, 1].set(title="pass rate of rollouts (training prompts)")
    title = "held-out accuracy (greedy; dashed: samples; bands: 95 %)"
    all_axes[0, 0].set(title=title, ylabel="share correct", ylim=(0, 1.03))
    all_axes[0, 0].legend(loc="best", fontsize="medium" if len(counts) <= 6 else "x-small")
    for axes in all_axes[0]:
        axes.set(xlabel="step")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_accuracy(record: RunRecord, axes: Axes, colour: tuple[float, float, float]) -> None:
    """Draw the held-out accuracy of a run, greedy and of samples."""
    steps = [row["step"] for row in record.evaluations]
    for prefix, style in (("", "-"), ("sampled_", "--"))[: 1 + _is_sampled(record)]:
        low, accuracies, high = (
            [row[f"{prefix}{key}"] for row in record.evaluations] for key in ("low", "accuracy", "high")
        )
        axes.plot(steps, accuracies, style, marker="o", markersize=4, color=colour)
        axes.fill_between(steps, low, high, alpha=0.15, color=colour)


def _first_and_last(record: RunRecord) -> tuple[Row, Row]:
    if not record.evaluations:
        raise ConfigError(f"run {record.name} has no held-out evaluation; set data.held_out in its recipe")
    return record.evaluations[0], record.evaluations[-1]


def _is_sampled(record: RunRecord) -> bool:
    """Return whether every evaluation of the run has sampled responses too."""
    return all("sampled_accuracy" in row for row in record.evaluations)


def _sampled_summary(first: Row, last: Row) -> dict[str, float]:
    key = "sampled_accuracy"
    return {f"{key}_before": first[key], f"{key}_after": last[key]} if key in first and key in last else {}


def _accuracies(record: RunRecord, prefix: str = "") -> tuple[str, str, str]:
    """Format accuracy before and after, and the gain in percentage points."""
    first, last = _first_and_last(record)
    gain = 100 * (last[f"{prefix}accuracy"] - first[f"{prefix}accuracy"])
    return _with_interval(first, prefix), _with_interval(last, prefix), f"{gain:+.1f}"


def _with_interval(row: Row, prefix: str) -> str:
    low, high = 100 * row[f"{prefix}low"], 100 * row[f"{prefix}high"]
    return f"{row[f'{prefix}accuracy']:.1%}\n{low:.1f} to {high:.1f}"
