"""Rollouts beside the page: one script per step, loaded when the reader opens the step.

A page opened from disk may load scripts of its folder, but may not read files; a script file holds one call of
`oreal_step` with JSON, in ASCII. Its texts enter the document as text nodes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oreal_megatron.observe.page import token_values
from oreal_megatron.observe.page.run_data import RunData, rollout_steps, rows_by_prompt, spread
from oreal_megatron.runtime import checkpoint_folders

LONGEST_TEXT = 100_000  # characters of a response that are shown


def write_steps(run: RunData, number: int, folder: Path, most: int, decode: token_values.Decode | None) -> list[Any]:
    """Write at most so many steps of a run, evenly spread; return their numbers with file names and bytes."""
    listing = []
    for step in spread(rollout_steps(run.path), most):
        file = folder / f"run_{number}_step_{step:06d}.js"
        text = json.dumps(step_content(run.path, step, decode), separators=(",", ":"))
        file.write_text(f"oreal_step({number},{step},{text});\n", encoding="ascii")
        listing.append({"step": step, "file": f"{folder.name}/{file.name}", "bytes": file.stat().st_size})
    return listing


def step_content(run: Path, step: int, decode: token_values.Decode | None) -> list[dict[str, Any]]:
    """Return the prompts of a step with their rollouts."""
    folder = run / "dumps" / checkpoint_folders.name(step)
    chosen = token_values.of_step(folder, decode) if decode else {}
    return [
        {
            "slot": slot,
            "question": rows[0]["question"],
            "gold": rows[0]["gold_answer"],
            "rollouts": _rollouts(rows, chosen),
        }
        for slot, rows in rows_by_prompt(run, step).items()
    ]


def _rollouts(rows: Sequence[dict[str, Any]], chosen: dict[token_values.Key, dict[str, Any]]) -> list[dict[str, Any]]:
    rollouts = []
    for row in rows:
        values = chosen.get((row["slot"], row["index"]))
        content = {key: row.get(key) for key in ("index", "tokens", "finished", "verdict", "method", "extracted")}
        content["response"] = row["response"][:LONGEST_TEXT]
        if row.get("reason"):
            content["reason"] = row["reason"]
        if values:
            content["chosen"] = values
        rollouts.append(content)
    return rollouts
