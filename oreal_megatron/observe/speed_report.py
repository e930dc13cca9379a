"""Speed of a run as a table, and as JSON beside its hardware so that runs can be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from oreal_megatron.observe.rows import Row
from oreal_megatron.observe.run_report import RunRecord
from oreal_megatron.observe.speed import PARTS
from oreal_megatron.observe.tables import add_columns, simple_table
from oreal_megatron.runtime import files

PHASES = ("generate", "verify", "parity", "reward_model", "reference", "policy", "weight_sync", "checkpoint")
RATES = ("tokens_per_second_per_gpu", "tflops_per_second_per_gpu", "mfu", "idle")
DEFINITIONS = {
    "steps": "means over the counted steps: not frozen ones nor the first after a start, unless there are no others",
    "seconds": "wall clock of the first rank per step, evaluations excluded",
    "share": "share of the step's seconds",
    "tokens_per_second_per_gpu": "tokens of prompts and responses that the phase processed / its seconds / GPUs, as in "
    "NeMo-RL; for the step: tokens of all rollouts",
    "tflops_per_second_per_gpu": "1e12 operations of the model / the phase's seconds / GPUs; one forward pass for the "
    "reference, three for an update; recomputation is not counted",
    "mfu": "operations per second and GPU / the GPU's peak in bf16 without sparsity; absent if the peak is unknown",
    "idle": "1 - mean / maximum, over ranks, of the time until a rank has finished its part (generate, verify), or of "
    "the operations assigned to data-parallel replicas (training); for the step: weighted by their seconds",
    "bubble": "f (stages - 1) / (micro-batches x chunks + f (stages - 1)), the ideal bubble of the pipeline schedule, "
    "with f = 1 fill and drain for reward model and reference, one for each mini-batch of the policy, weighted by cost",
    "sync": "the phase weight_sync, in steps that moved weights; bytes received by the busiest rank",
}


def summary(record: RunRecord) -> dict[str, Any]:
    """Return the speed of a run as JSON values; absent: not measured. {} if no step was timed."""
    rows = _counted_rows(record)
    if not any("seconds/step" in row for row in rows):
        return {}
    step = _mean_seconds(rows, "step")
    phases = {name: _phase(rows, name, step) for name in PHASES if any(f"seconds/{name}" in row for row in rows)}
    other = step - sum(phase["seconds"] for phase in phases.values())
    return _drop_none(
        {
            "run": record.name,
            "hardware": record.environment.get("hardware"),
            "steps": {"logged": len(record.metrics), "counted": len(rows), "first": rows[0]["step"]},
            "phases": phases | {"other": {"seconds": other, "share": other / step}, "step": _phase(rows, "step", step)},
            "idle_training": _weighted_mean(rows, "speed/idle/training", PARTS["training"]),
            "bubble": _weighted_mean(rows, "speed/bubble", PARTS["training"]),
            "sync": _sync([row for row in rows if "weight_sync/received_bytes" in row]),
            "definitions": DEFINITIONS,
        }
    )


def write_and_print(record: RunRecord) -> None:
    """Write speed.json into the run folder and print the table; do nothing if no step was logged."""
    if speed := summary(record):
        files.write_text(Path(record.name) / "speed.json", json.dumps(speed, indent=2) + "\n")
        print_table(speed)


def print_table(speed: Mapping[str, Any]) -> None:
    """Print one run's `summary`."""
    table = simple_table(f"\nspeed: {speed['run']}", "\n".join(_caption_lines(speed)))
    add_columns(table, "phase", "seconds", "share", "tokens/s/GPU", "TFLOP/s/GPU", "MFU", "idle")
    columns = (("seconds", ".3f"), ("share", ".1%"), *zip(RATES, (",.0f", ".3g", ".1%", ".1%"), strict=True))
    for name, phase in speed["phases"].items():
        cells = [format(phase[key], form) if key in phase else "" for key, form in columns]
        table.add_row(name, *cells, style="bold" if name == "step" else None)
    Console().print(table)


def _caption_lines(speed: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the table has no column for."""
    hardware, steps, sync = speed.get("hardware"), speed["steps"], speed.get("sync")
    yield f"{_hardware(hardware)}; means of {steps['counted']} of {steps['logged']} steps, from step {steps['first']}"
    if "bubble" in speed:
        imbalance = f", load imbalance {speed['idle_training']:.1%}" if "idle_training" in speed else ""
        yield f"training: ideal pipeline bubble {speed['bubble']:.1%}{imbalance}"
    if sync:
        rate = f", {sync['gigabytes_per_second']:.3g} GB/s" if "gigabytes_per_second" in sync else ""
        received = sync["received_bytes"] / 1e6
        yield f"weight sync: {sync['seconds']:.3f} s, {received:.1f} MB received by the busiest rank{rate}"
    if hardware and "peak_tflops" not in hardware:
        yield "no MFU: the peak of this device in this precision is unknown"


def _hardware(hardware: Mapping[str, Any] | None) -> str:
    if not hardware:
        return "hardware not recorded"
    counts = [
        f"{hardware[key]} {word}{'s' * (hardware[key] > 1)}" for key, word in (("gpus", "rank"), ("nodes", "node"))
    ]
    return f"{' on '.join(counts)} ({hardware['device']})"


def _counted_rows(record: RunRecord) -> list[Row]:
    """Return the steps that represent the run: all models train, and nothing is compiled or allocated first."""
    config, rows = record.config, [row for row in record.metrics if "seconds/step" in row]
    frozen = config.get("policy_freeze_steps", 0) if config["reward_model"]["enabled"] else 0
    warm = [row for row in rows if row["step"] not in record.starts]
    return [row for row in warm if row["step"] >= frozen] or warm or rows


def _phase(rows: Sequence[Row], name: str, step: float) -> dict[str, float]:
    seconds = _mean_seconds(rows, name)
    rates = {kind: _weighted_mean(rows, f"speed/{kind}/{name}", [name]) for kind in RATES}
    return _drop_none({"seconds": seconds, "share": seconds / step, **rates})


def _sync(rows: Sequence[Row]) -> dict[str, float] | None:
    if not rows:
        return None
    received = sum(row["weight_sync/received_bytes"] for row in rows) / len(rows)
    rate = _weighted_mean(rows, "weight_sync/gigabytes_per_second", ["weight_sync"])
    return _drop_none(
        {"seconds": _mean_seconds(rows, "weight_sync"), "received_bytes": received, "gigabytes_per_second": rate}
    )


def _mean_seconds(rows: Sequence[Row], phase: str) -> float:
    """Return the mean seconds of a phase; a step without the phase counts as 0."""
    return sum(row.get(f"seconds/{phase}", 0.0) for row in rows) / len(rows)


def _weighted_mean(rows: Sequence[Row], key: str, phases: Sequence[str]) -> float | None:
    """Return the mean of a rate weighted by the seconds of the phases: the rate of all steps together."""
    weights = [(row[key], sum(row.get(f"seconds/{phase}", 0.0) for phase in phases)) for row in rows if key in row]
    total = sum(seconds for _, seconds in weights)
    return sum(value * seconds for value, seconds in weights) / total if total else None


def _drop_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
