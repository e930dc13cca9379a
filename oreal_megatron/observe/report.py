"""Reading run folders back: table, learning curve, summary."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from oreal_megatron.config import ConfigError
from oreal_megatron.observe.rows import read_rows
from oreal_megatron.runtime import files


@dataclasses.dataclass(frozen=True)
class Record:
    """One run folder."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    starts: frozenset[int]  # steps that were the first after a start

    @property
    def seconds(self) -> float:
        return sum(row["seconds/step"] for row in self.metrics)


def read(path: Path) -> Record:
    for name in ("config.json", "metrics.jsonl"):
        if not (path / name).is_file():
            raise ConfigError(f"{path} is not a run folder: it has no {name}")
    return Record(
        str(path),
        files.read_object(path / "config.json"),
        files.read_object(path / "environment.json"),
        read_rows(path / "metrics.jsonl"),
        read_rows(path / "evaluations.jsonl"),
        frozenset({0, *(int(file.stem.rsplit("_", 1)[1]) for file in path.glob("config_before_step_*.json"))}),
    )


def summary(record: Record) -> dict[str, Any]:
    """What the run was and what it reached."""
    first, last = _ends(record)
    return {
        "accuracy_before": first["accuracy"],
        "accuracy_after": last["accuracy"],
        "interval_before": [first["low"], first["high"]],
        "interval_after": [last["low"], last["high"]],
        "problems": last["answers"],
        "steps": len(record.metrics),
        "seed": record.config["seed"],
        "reward_model": record.config["reward_model"]["enabled"],
        **{name.replace("-", "_"): version for name, version in record.environment["imported"].items()},
    }


def print_table(records: list[Record]) -> None:
    table = Table(title="held-out accuracy, greedy, with 95 % interval")
    for column in ("run", "seed", "reward model", "before", "after", "gain", "steps", "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for record in records:
        table.add_row(
            record.name,
            str(record.config["seed"]),
            "yes" if record.config["reward_model"]["enabled"] else "no",
            *(_reached(record) if record.evaluations else ("not evaluated", "", "")),
            str(len(record.metrics)),
            f"{record.seconds:.0f}",
        )
    Console(width=150).print(table)


def draw(records: list[Record], path: Path) -> None:
    """Held-out accuracy with its 95 % band, and the pass rate of sampled answers, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (held_out, sampled) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for record in records:
        steps = [row["step"] for row in record.evaluations]
        (line,) = held_out.plot(steps, [row["accuracy"] for row in record.evaluations], marker="o", label=record.name)
        low, high = ([row[end] for row in record.evaluations] for end in ("low", "high"))
        held_out.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
        rates = [row["reward/pass_rate"] for row in record.metrics]
        sampled.plot([row["step"] for row in record.metrics], rates, linewidth=0.9, color=line.get_color())
    held_out.set(title="held-out accuracy (greedy, 95 % band)", xlabel="step", ylabel="share right", ylim=(0, 1))
    sampled.set(title="pass rate of sampled answers (training prompts)", xlabel="step")
    held_out.legend()
    for axes in (held_out, sampled):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _ends(record: Record) -> tuple[dict[str, Any], dict[str, Any]]:
    if not record.evaluations:
        raise ConfigError(f"run {record.name} has no held-out evaluation; set data.held_out in its recipe")
    return record.evaluations[0], record.evaluations[-1]


def _reached(record: Record) -> tuple[str, str, str]:
    """Accuracy before and after, and the gain."""
    first, last = _ends(record)
    gain = f"{100 * (last['accuracy'] - first['accuracy']):+.1f} points"
    return _with_interval(first), _with_interval(last), gain


def _with_interval(row: dict[str, Any]) -> str:
    return f"{row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
