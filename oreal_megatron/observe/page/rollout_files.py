"""Rollouts beside the page: one script per step, loaded when the reader opens the step.

A page opened from disk may load scripts of its folder, but may not read files; a script file holds one call of
`oreal_step` with JSON, in ASCII. Its texts enter the document as text nodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from oreal_megatron.observe.page import formulas, token_values
from oreal_megatron.observe.page.run_data import RunData, rollout_steps, rows_by_prompt, spread
from oreal_megatron.runtime import checkpoint_folders


class PromptResult(NamedTuple):
    """Result of a prompt in one step."""

    step: int
    slot: int
    correct: int  # rollouts
    known: int  # rollouts with a known verdict


NO_HISTORIES: Mapping[str, Sequence[PromptResult]] = {}
LONGEST_TEXT = 100_000  # characters of a response that are shown


def write_steps(
    run: RunData,
    number: int,
    folder: Path,
    most: int,
    decode: token_values.Decode | None,
    translate: formulas.Translate | None,
) -> list[Any]:
    """Write at most so many steps of a run, evenly spread; return their numbers with file names and bytes."""
    listing = []
    steps = spread(rollout_steps(run.path), most)
    histories = prompt_histories(run.path, steps)
    for step in steps:
        file = folder / f"run_{number}_step_{step:06d}.js"
        prompts = step_content(run.path, step, decode, histories)
        drawn = formulas.add_formulas(prompts, translate) if translate else []
        text = json.dumps([number, step, prompts, drawn], separators=(",", ":"))
        file.write_text(f"oreal_step({text[1:-1]});\n", encoding="ascii")
        listing.append({"step": step, "file": f"{folder.name}/{file.name}", "bytes": file.stat().st_size})
    return listing


def prompt_histories(run: Path, steps: Sequence[int]) -> dict[str, list[PromptResult]]:
    """Return the results of each question in these steps, for those that occur several times."""
    histories: dict[str, list[PromptResult]] = {}
    for step in steps:
        for slot, rows in rows_by_prompt(run, step).items():
            verdicts = [row["verdict"] for row in rows if row["verdict"] != "unknown"]
            result = PromptResult(step, slot, verdicts.count("correct"), len(verdicts))
            histories.setdefault(rows[0]["question"], []).append(result)
    return {question: results for question, results in histories.items() if len(results) > 1}


def step_content(
    run: Path,
    step: int,
    decode: token_values.Decode | None,
    histories: Mapping[str, Sequence[PromptResult]] = NO_HISTORIES,
) -> list[dict[str, Any]]:
    """Return the prompts of a step with their rollouts, and their results in other steps."""
    folder = run / "dumps" / checkpoint_folders.name(step)
    chosen = token_values.of_step(folder, decode) if decode else {}
    return [
        {
            "slot": slot,
            "question": rows[0]["question"],
            "gold": rows[0]["gold_answer"],
            "rollouts": _rollouts(rows, chosen),
            "history": histories.get(rows[0]["question"], ()),
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
