"""Output folder of `oreal evaluate`: settings.json, results.json, table.md."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from oreal_megatron.config import ConfigError, SamplingConfig
from oreal_megatron.config.user_functions import read_source
from oreal_megatron.evaluation import suites
from oreal_megatron.evaluation.score import SuiteScores
from oreal_megatron.observe.tables import add_columns, simple_table
from oreal_megatron.records import Prompt
from oreal_megatron.runtime import distributed, files
from oreal_megatron.session.inputs import Inputs

ScoresByMode = Mapping[str, SuiteScores]  # "greedy", "sampled"


def default_folder(model: str) -> Path:
    """Return the output folder for a model, if none is given."""
    parts = Path(model.split(":")[-1]).parts
    return Path("runs/evaluations") / "_".join(parts[-3:]).strip("_/.")


def check_settings(
    out: Path, inputs: Inputs, modes: Mapping[str, SamplingConfig], suite_prompts: Mapping[str, Sequence[Prompt]]
) -> None:
    """Write what the responses in `out` depend on; raise ConfigError if it holds responses of others. Collective."""
    config = inputs.config
    present = {
        "model": inputs.folder.fingerprint(),
        "system_prompt": config.data.system_prompt,
        "seed": config.seed,
        "max_model_len": config.engine.max_model_len,
        "dtype": config.engine_dtype,
        "thinking_end": list(config.verify.thinking_end),
        "judge": config.verify.judge.model or bool(config.verify.judge.urls),
        "verify.function": read_source(config.verify.function).digest if config.verify.function else "",
        **{f"suite {Path(name).stem}": _digest(prompts) for name, prompts in suite_prompts.items()},
        **{name: dataclasses.asdict(sampling) for name, sampling in modes.items()},
    }
    file = out / "settings.json"
    before = files.read_object(file) if file.is_file() else {}
    changed = [key for key in before.keys() & present.keys() if before[key] != present[key]]
    if changed := distributed.all_gather_object(changed)[0]:
        raise ConfigError(
            f"{out} holds responses with another {', '.join(sorted(changed))}; choose another folder with --out"
        )
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(before | present, indent=2) + "\n")


def _digest(problems: Sequence[Prompt]) -> str:
    """Return a digest of questions and gold answers: the name of a suite does not identify its problems."""
    text = json.dumps([(prompt.question, prompt.gold) for prompt in problems])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_results(
    out: Path, model: str, scores: Mapping[str, ScoresByMode], overlap: Mapping[str, list[int]] | None
) -> None:
    """Write results.json and table.md, merged with those of earlier calls, and print the scores."""
    file = out / "results.json"
    before = files.read_object(file) if file.is_file() else {"suites": {}, "seen_in_training": {}}
    seen = {name: numbers for name, numbers in (before["seen_in_training"] or {}).items() if name not in scores}
    seen |= overlap or {}
    merged = before["suites"] | {name: before["suites"].get(name, {}) | dict(modes) for name, modes in scores.items()}
    document = {"model": model, "suites": merged, "seen_in_training": seen}
    files.write_text(file, json.dumps(document, indent=2) + "\n")
    notes = list(_overlap_notes(merged, seen))
    text = markdown_table(model, {name: suites.named(name).title for name in merged}, merged)
    (out / "table.md").write_text("\n".join([text, *notes]) + "\n")
    _print_scores(model, merged)
    console = Console()
    for line in ("", *notes):
        console.print(line, highlight=False, markup=False)
    print(f"Responses, results.json and table.md: {out}")  # one line, to be copied


def _overlap_notes(scores: Mapping[str, ScoresByMode], seen: Mapping[str, list[int]]) -> list[str]:
    """Return one sentence per suite about its overlap with the training prompts."""
    notes = [
        f"{name}: {score['skipped']} problems were skipped and are in no score; the log names them."
        for name, modes in scores.items()
        for score in list(modes.values())[:1]
        if score.get("skipped")
    ]
    notes += [
        f"{name}: {len(numbers)} of {scores[name]['greedy']['problems']} problems occur in the training prompts."
        for name, numbers in seen.items()
    ]
    if unchecked := [name for name in scores if name not in seen]:
        notes.append(f"{', '.join(unchecked)}: not checked for contamination; use --training FILE.jsonl.")
    return notes


def _print_scores(model: str, scores: Mapping[str, ScoresByMode]) -> None:
    """Print one line per suite and mode; table.md compares with the paper."""
    table = simple_table(f"\n{model}")
    add_columns(table, "suite", "mode", "accuracy", "95 %", "pass@k", "maj@k", "tokens", "truncated", "unknown")
    for name, modes in scores.items():
        for mode, score in modes.items():
            k, (low, high) = score["answers_per_problem"], (100 * end for end in score["interval"])
            several = (_pass_at_k(score), f"{100 * score['majority']:.1f}") if k > 1 else ("", "")
            cells = [f"{100 * score['accuracy']:.1f}", f"{low:.1f}–{high:.1f}", *several, *_length_cells(score)]
            table.add_row(suites.named(name).title, f"avg@{k}" if mode == "sampled" else mode, *cells)
    Console().print(table)


def _length_cells(score: SuiteScores) -> tuple[str, str, str]:
    """Return mean tokens, share of truncated and number of unknown; older results.json may lack them."""
    tokens, truncated, unknown = score.get("tokens"), score.get("truncated"), score.get("unknown")
    return (
        "" if tokens is None else f"{tokens['mean']:.0f}",
        "" if truncated is None else f"{truncated:.1%}",
        "" if unknown is None else str(unknown),
    )


def markdown_table(model: str, titles: Mapping[str, str], scores: Mapping[str, ScoresByMode]) -> str:
    """Return this model's scores with 95 % intervals above those of the paper, in percent."""
    lines = ["| model | " + " | ".join(titles.values()) + " |", "|---" * (len(titles) + 1) + "|"]

    def add_line(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    for mode, words in (("greedy", "pass@1, greedy"), ("sampled", "avg@{k}")):
        mode_scores = [modes.get(mode) for modes in scores.values()]
        first = next(filter(None, mode_scores), None)
        if first:
            k = first["answers_per_problem"]
            add_line(f"**{model}**, {words.format(k=k)}", [_cell(score, _with_interval) for score in mode_scores])
    if first:  # sampled
        add_line(f"**{model}**, pass@{k}", [_cell(score, _pass_at_k) for score in mode_scores])
        majority = [_cell(score, lambda score: f"{100 * score['majority']:.1f}") for score in mode_scores]
        add_line(f"**{model}**, maj@{k}", majority)
    columns = [suites.PAPER_SUITES.index(name) if name in suites.PAPER_SUITES else None for name in titles]
    for name, published in suites.PAPER.items() if any(column is not None for column in columns) else ():
        add_line(f"{name} (paper)", ["–" if column is None else f"{published[column]:.1f}" for column in columns])
    return "\n".join(lines) + "\n"


def _cell(score: SuiteScores | None, text: Callable[[SuiteScores], str]) -> str:
    return text(score) if score else "–"


def _pass_at_k(score: SuiteScores) -> str:
    """Return pass@K of K responses; results of 0.1.0 have it for powers of two up to 128 only."""
    value = score["pass_at"].get(str(score["answers_per_problem"]))
    return "–" if value is None else f"{100 * value:.1f}"


def _with_interval(score: SuiteScores) -> str:
    low, high = (100 * end for end in score["interval"])
    return f"{100 * score['accuracy']:.1f} ({low:.1f} to {high:.1f})"
