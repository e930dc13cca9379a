"""The page of `oreal report --html`: all sections in one file, and the rollouts in a folder beside it."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from oreal_megatron.config import ConfigError
from oreal_megatron.observe.page import demonstrations, formulas, panels, rollout_files, run_data, tables
from oreal_megatron.observe.page.findings import findings
from oreal_megatron.observe.page.run_data import RunData, read
from oreal_megatron.observe.page.token_values import Decode
from oreal_megatron.observe.run_report import RunRecord, short_names
from oreal_megatron.observe.token_decoder import token_decoder
from oreal_megatron.runtime import files

SECTIONS = ("Overview", "Learning", "Rollouts", "Reward model", "Stability", "Time", "Settings", "Trajectories")
FILES = Path(__file__).parent
SCRIPTS = ("charts.js", "texts.js", "viewer.js", "refresh.js")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refresh:
    """Reload of a served page: the version that it shows, and the seconds between two looks at the server's."""

    version: str
    poll_s: float


def write(records: Sequence[RunRecord], out: Path, most_steps: int, refresh: Refresh | None = None) -> str:
    """Write the page, and the rollouts of at most `most_steps` steps of each run into the folder OUT_rollouts.

    Return what was written in words.
    """
    names = short_names([Path(record.name) for record in records])
    runs = [read(record, name) for record, name in zip(records, names, strict=True)]
    folder = out.with_name(f"{out.stem}_rollouts")
    files.set_aside(folder)
    listing = []
    if most_steps and any((run.path / "rollouts").is_dir() for run in runs):
        folder.mkdir(exist_ok=True)
        translate = formulas.translator()
        for number, run in enumerate(runs):
            steps = rollout_files.write_steps(run, number, folder, most_steps, _decoder(run), translate)
            listing.append({"name": run.name, "steps": steps})
    out.write_text(page(runs, listing, refresh), encoding="utf-8")
    return _describe(out, folder, [step["bytes"] for run in listing for step in run["steps"]])


def _decoder(run: RunData) -> Decode | None:
    """Return the decoder of a run's tokens; None where there are no dumps, or where its tokenizer is gone."""
    if not (run.path / "dumps").is_dir():
        return None
    saved = [run.path / name for name in ("policy", "best") if (run.path / name).is_dir()]
    model = str(saved[0] if saved else run.record.config["model"]["path"])
    try:
        return token_decoder(model)
    except ConfigError as error:
        log.warning("tokens of %s are not coloured: %s", run.name, error)
        return None


def _describe(out: Path, folder: Path, sizes: Sequence[int]) -> str:
    text = f"page: {out} ({out.stat().st_size / 1e6:.1f} MB)"
    if sizes:
        text += (
            f"; rollouts of {len(sizes)} steps: {folder} ({sum(sizes) / 1e6:.1f} MB, the largest step "
            f"{max(sizes) / 1e6:.1f} MB), which belongs beside the page"
        )
    return text


def page(runs: Sequence[RunData], listing: Sequence[dict[str, Any]], refresh: Refresh | None = None) -> str:
    """Return the text of the page; `listing`: the steps of each run with rollouts beside it."""
    nonce = secrets.token_hex(16)  # no other script runs, whatever a text of a run holds
    policy = f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; img-src data:"
    live = ""
    if refresh:
        policy += "; connect-src 'self'"
        live = f' data-version="{escape(refresh.version)}" data-poll="{refresh.poll_s:.0f}"'
    title = ", ".join(run.name for run in runs)
    contents = (
        _overview(runs),
        _learning(runs),
        _rollouts(runs),
        _reward_model(runs),
        _grid(panels.draw_panel(panel, runs) for panel in panels.STABILITY),
        _time(runs),
        _settings(runs),
        _trajectories(listing, runs),
    )
    scripts = "".join((FILES / name).read_text() for name in SCRIPTS)
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in SECTIONS)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{name}</h2>{content}</section>'
        for name, content in zip(SECTIONS, contents, strict=True)
    )
    return (
        f'<!doctype html><html lang="en"{live}><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<title>OREAL: {escape(title)}</title><link rel="icon" href="data:,">'
        f'<style nonce="{nonce}">{(FILES / "page.css").read_text()}</style></head><body>'
        f"<header><h1>{escape(title)}</h1><nav>{links}</nav></header><main>{body}</main>"
        f'<script type="application/json" id="listing">{script_json(listing)}</script>'
        f'<script nonce="{nonce}">{scripts}</script></body></html>\n'
    )


def script_json(value: object) -> str:
    """Return JSON that may stand within a script element: no character of it ends the element."""
    return json.dumps(value).replace("<", "\\u003c")


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "_")


def _grid(figures: Iterable[str]) -> str:
    drawn = "".join(figures)
    return f'<div class="grid">{drawn}</div>' if drawn else '<p class="empty">not recorded</p>'


def _heading(run: RunData, runs: Sequence[RunData]) -> str:
    return f" ({run.name})" if len(runs) > 1 else ""


def _overview(runs: Sequence[RunData]) -> str:
    notes = []
    for run in runs:
        if texts := findings(run):
            items = "".join(f"<li>{escape(text)}</li>" for text in texts)
            notes.append(f'<h3>To look at{escape(_heading(run, runs))}</h3><ul class="findings">{items}</ul>')
    quiet = '<p class="note">No figure is out of its usual range.</p>'
    return tables.overview(runs) + ("".join(notes) or quiet)


def _learning(runs: Sequence[RunData]) -> str:
    drawn = [panels.draw_panel(panel, runs) for panel in (*panels.LEARNING, *panels.own(runs))]
    return _grid([panels.draw_accuracy(runs), *drawn])


def _rollouts(runs: Sequence[RunData]) -> str:
    figures = [panels.draw_panel(panel, runs) for panel in panels.ROLLOUTS]
    for run in runs:
        heading = _heading(run, runs)
        figures += [draw(run, heading) for draw in (panels.draw_prompts, panels.draw_pass_rates, panels.draw_methods)]
    return _grid(figures)


def _reward_model(runs: Sequence[RunData]) -> str:
    return _grid([*(panels.draw_panel(panel, runs) for panel in panels.REWARD_MODEL), panels.draw_calibration(runs)])


def _time(runs: Sequence[RunData]) -> str:
    figures = [panels.draw_phases(run, _heading(run, runs)) for run in runs]
    figures += [panels.draw_panel(panel, runs) for panel in panels.SPEED]
    return _grid(figures) + "".join(tables.speed(run) for run in runs)


def _settings(runs: Sequence[RunData]) -> str:
    parts = []
    if len(runs) > 1:
        parts.append(f"<h3>Differences</h3>{tables.differences(runs)}")
    for run in runs:
        parts.append(_details(f"All settings{_heading(run, runs)}", tables.settings(run)))
        for name, text in tables.source_texts(run):
            parts.append(_details(f"{name}{_heading(run, runs)}", f"<pre>{escape(text)}</pre>"))
    parts.append(_details("Environment", tables.environment(runs)))
    return "".join(parts)


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _trajectories(listing: Sequence[dict[str, Any]], runs: Sequence[RunData]) -> str:
    shown = "".join(demonstrations.draw(run, _decoder(run)) for run in runs if not run_data.rollout_steps(run.path))
    if not any(run["steps"] for run in listing):
        return shown or '<p class="empty">no rollouts are beside this page</p>'
    return shown + (
        '<noscript><p class="empty">the rollouts need JavaScript</p></noscript><div id="viewer" class="viewer"></div>'
    )
