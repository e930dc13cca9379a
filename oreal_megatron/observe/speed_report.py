"""The speed of a run in one table, and as JSON beside its hardware, so that two runs can be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from oreal_megatron.observe.report import Record
from oreal_megatron.observe.speed import PARTS
from oreal_megatron.runtime import files

Row = dict[str, Any]  # of metrics.jsonl
PHASES = ("generate", "verify", "parity", "reward_model", "reference", "policy", "weight_sync", "checkpoint")
RATES = ("tokens_per_second_per_gpu", "tflops_per_second_per_gpu", "mfu", "idle")
DEFINITIONS = {
    "steps": "means over the steps counted: neither frozen ones nor the first after a start, where others are left",
    "seconds": "wall clock of the first rank for each step; evaluations are not part of it",
    "share": "of the step's seconds",
    "tokens_per_second_per_gpu": "tokens of prompts and responses that the phase processed / its seconds / GPUs, as "
    "NeMo-RL; of the step: those of all answers",
    "tflops_per_second_per_gpu": "1e12 operations of the model / the phase's seconds / GPUs; a pass forward once for "
    "the reference, three times for an update; recomputation is not counted",
    "mfu": "operations per second and GPU / the GPU's peak in bf16 without sparsity; absent where that is not known",
    "idle": "1 - mean / largest, over ranks, of the time until a rank has done its part (generate, verify), or of the "
    "operations dealt to data-parallel replicas (training); of the step: weighted by their seconds",
    "bubble": "(stages - 1) / (micro-batches x chunks + stages - 1), the ideal of the pipeline's schedule",
    "sync": "the phase reshard, in steps that moved weights; bytes that the busiest rank received",
}


def summary(record: Record) -> dict[str, Any]:
    """What is known of the run's speed. What was not measured is absent: {} where no step was logged."""
    rows = _counted(record)
    if not rows:
        return {}
    step = _mean(rows, "step")
    phases = {name: _phase(rows, name, step) for name in PHASES if any(f"seconds/{name}" in row for row in rows)}
    other = step - sum(phase["seconds"] for phase in phases.values())
    return _known(
        {
            "run": record.name,
            "hardware": record.environment.get("hardware"),
            "steps": {"logged": len(record.metrics), "counted": len(rows), "first": rows[0]["step"]},
            "phases": phases | {"other": {"seconds": other, "share": other / step}, "step": _phase(rows, "step", step)},
            "idle_training": _weighted(rows, "speed/idle/training", PARTS["training"]),
            "bubble": _weighted(rows, "speed/bubble", PARTS["training"]),
            "sync": _sync([row for row in rows if "weight_sync/received_bytes" in row]),
            "definitions": DEFINITIONS,
        }
    )


def leave(record: Record) -> None:
    """At the end of a run: speed.json in its folder, and the table."""
    if found := summary(record):
        files.write_text(Path(record.name) / "speed.json", json.dumps(found, indent=2) + "\n")
        print_table(found)


def print_table(found: dict[str, Any]) -> None:
    """One run's `summary`."""
    table = Table(title=f"speed: {found['run']}", title_justify="left", caption=_caption(found), caption_justify="left")
    for column in ("phase", "seconds", "share", "tokens/s/GPU", "TFLOP/s/GPU", "MFU", "idle"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, phase in found["phases"].items():
        formats = ("seconds", ".3f"), ("share", ".1%"), *zip(RATES, (",.0f", ".3g", ".1%", ".1%"), strict=True)
        cells = [format(phase[key], form) if key in phase else "" for key, form in formats]
        table.add_row(name, *cells, style="bold" if name == "step" else None)
    Console(width=100).print(table)


def _caption(found: dict[str, Any]) -> str:
    """What the table does not hold, in sentences."""
    on, steps, sync = found.get("hardware"), found["steps"], found.get("sync")
    lines = [f"{_where(on)}; means of {steps['counted']} of {steps['logged']} steps, from step {steps['first']}"]
    if "bubble" in found:
        dealt = f"; operations dealt unevenly: {found['idle_training']:.1%}" if "idle_training" in found else ""
        lines.append(f"pipeline bubble of training: {found['bubble']:.1%} at best{dealt}")
    if sync:
        rate = f", {sync['gigabytes_per_second']:.3g} GB/s" if "gigabytes_per_second" in sync else ""
        received = sync["received_bytes"] / 1e6
        lines.append(f"sync: {sync['seconds']:.3f} s, {received:.1f} MB received by the busiest rank{rate}")
    if on and "peak_tflops" not in on:
        lines.append("MFU: the peak of this device in this precision is not known")
    return "\n".join(lines)


def _where(on: dict[str, Any] | None) -> str:
    if not on:
        return "hardware not recorded"
    counts = (f"{on[key]} {word}{'s' * (on[key] > 1)}" for key, word in (("gpus", "rank"), ("nodes", "machine")))
    return f"{' on '.join(counts)} ({on['device']})"


def _counted(record: Record) -> list[Row]:
    """The steps that say how fast the run is: all models learn, and nothing is done for the first time."""
    config, rows = record.config, record.metrics
    frozen = config.get("policy_freeze_steps", 0) if config["reward_model"]["enabled"] else 0
    warm = [row for row in rows if row["step"] not in record.starts]
    return [row for row in warm if row["step"] >= frozen] or warm or rows


def _phase(rows: Sequence[Row], name: str, step: float) -> dict[str, float]:
    seconds = _mean(rows, name)
    found = {kind: _weighted(rows, f"speed/{kind}/{name}", [name]) for kind in RATES}
    return _known({"seconds": seconds, "share": seconds / step, **found})


def _sync(rows: Sequence[Row]) -> dict[str, float] | None:
    if not rows:
        return None
    received = sum(row["weight_sync/received_bytes"] for row in rows) / len(rows)
    rate = _weighted(rows, "weight_sync/gigabytes_per_second", ["weight_sync"])
    return _known({"seconds": _mean(rows, "weight_sync"), "received_bytes": received, "gigabytes_per_second": rate})


def _mean(rows: Sequence[Row], phase: str) -> float:
    """Seconds; a step without the phase spent none in it."""
    return sum(row.get(f"seconds/{phase}", 0.0) for row in rows) / len(rows)


def _weighted(rows: Sequence[Row], key: str, phases: Sequence[str]) -> float | None:
    """The mean of a rate by the seconds that it was kept up for, as of tokens by seconds of all steps together."""
    weights = [(row[key], sum(row.get(f"seconds/{phase}", 0.0) for phase in phases)) for row in rows if key in row]
    total = sum(seconds for _, seconds in weights)
    return sum(value * seconds for value, seconds in weights) / total if total else None


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
