"""Tables of the page: overview, speed, settings and their differences, environment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from oreal_megatron.observe import speed_report
from oreal_megatron.observe.page.charts import format_value
from oreal_megatron.observe.page.run_data import RunData
from oreal_megatron.observe.run_report import steps_taken

LAST = ("reward/pass_rate", "policy/reference_kl", "rollout/truncated_share")
LONGEST_CELL = 400  # characters


def table(head: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", wraps: bool = False) -> str:
    """Return an HTML table; the first cell of a row is its heading."""
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{_cell(row[0])}</th>{"".join(f"<td>{_cell(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    kind = "" if wraps else ' class="figures"'
    return f'<div class="scroll"><table{kind}>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    if isinstance(value, float):
        return format_value(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return escape(text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]} ...")


def overview(runs: Sequence[RunData]) -> str:
    """Return the table of results, one row per run."""
    is_sampled = any("sampled_accuracy" in row for run in runs for row in run.record.evaluations)
    prefixes = ("", "sampled_") if is_sampled else ("",)
    rows = []
    for run in runs:
        accuracies = [_accuracy(run, number, prefix) for prefix in prefixes for number in (0, -1)]
        last = [run.mean_of_last(name) for name in LAST]
        figures = ["" if value is None else value for value in last]
        seconds = "" if run.record.seconds is None else f"{run.record.seconds:.0f}"
        rows.append((run.name, steps_taken(run.record), *accuracies, *figures, seconds))
    modes = [f"held-out {when}{mode}" for mode in ("", ", sampled")[: len(prefixes)] for when in ("before", "after")]
    head = ("run", "steps", *modes, "pass rate", "KL", "truncated", "seconds")
    return table(head, rows, "pass rate, KL and truncated share: mean of the last ten steps")


def _accuracy(run: RunData, number: int, prefix: str) -> str:
    """Return the accuracy of an evaluation with its interval, in per cent."""
    rows = [row for row in run.record.evaluations if f"{prefix}accuracy" in row]
    if not rows:
        return ""
    accuracy, low, high = (100 * rows[number][f"{prefix}{key}"] for key in ("accuracy", "low", "high"))
    return f"{accuracy:.1f} % ({low:.1f} to {high:.1f})"


def speed(run: RunData) -> str:
    """Return the table of phases of a run; a line if its steps were not timed."""
    summary = speed_report.summary(run.record)
    if not summary:
        return f'<p class="empty">{escape(run.name)}: not timed</p>'
    columns = (*speed_report.RATES[:2], "mfu", "idle")
    rows = []
    for name, phase in summary["phases"].items():
        rates = [phase.get(key, "") for key in columns]
        rows.append((name.replace("_", " "), phase["seconds"], f"{phase['share']:.1%}", *rates))
    head = ("phase", "seconds", "share", "tokens/s/GPU", "TFLOP/s/GPU", "MFU", "idle")
    steps = summary["steps"]
    return table(head, rows, f"{run.name}: means of {steps['counted']} of {steps['logged']} steps")


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Return the values of nested objects by their paths."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    parts = (flatten(inner, f"{path}.{key}" if path else str(key)) for key, inner in value.items())
    return {key: leaf for part in parts for key, leaf in part.items()}


def differences(runs: Sequence[RunData]) -> str:
    """Return the settings in which the runs differ."""
    flat = [flatten(run.record.config) for run in runs]
    keys = sorted({key for settings in flat for key in settings})
    rows = []
    for key in keys:
        values = [settings.get(key, "absent") for settings in flat]
        if any(value != values[0] for value in values):
            rows.append((key, *values))
    if not rows:
        return '<p class="empty">the settings are equal</p>'
    return table(("setting", *(run.name for run in runs)), rows, wraps=True)


def settings(run: RunData) -> str:
    """Return all settings of a run."""
    return table(("setting", "value"), list(flatten(run.record.config).items()), wraps=True)


def environment(runs: Sequence[RunData]) -> str:
    """Return versions, hardware and inputs, one column per run; texts of files are shown elsewhere."""
    flat = [flatten(run.record.environment) for run in runs]
    keys = [key for key in dict.fromkeys(key for values in flat for key in values) if not key.endswith(".text")]
    rows = [(key, *(values.get(key, "") for values in flat)) for key in keys]
    return table(("", *(run.name for run in runs)), rows, wraps=True)


def source_texts(run: RunData) -> list[tuple[str, str]]:
    """Return name and text of the recipe and of the functions of a run."""
    environment = run.record.environment
    recorded = [environment.get("recipe"), *(environment.get("functions") or {}).values()]
    return [(source["name"], source["text"]) for source in recorded if isinstance(source, dict)]
