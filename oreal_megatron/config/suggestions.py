"""Suggestions at the end of an error message about an unknown name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from oreal_megatron.config.schema import Section, config_keys, sections

MOST = 3  # suggestions in a message
LISTED = 12  # so many known names are listed where none is near


def suggest(name: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known ones, or all if they are few."""
    near = [other for other in known if name and (name in other or other in name) and not other.startswith("_")][:MOST]
    near = difflib.get_close_matches(name, known, MOST, 0.6) or near
    if near:
        return f"; did you mean {_either(near)}?"
    if len(known) <= LISTED:
        return f"; known are {', '.join(known)}"
    if nearest := difflib.get_close_matches(name, known, MOST, 0.2):
        return f"; of {len(known)} known names the nearest are {', '.join(nearest)}"
    return f"; of {len(known)} known names none is near"


def suggest_keys(path: str, config: Section) -> str:
    """Return the end of a message about an unknown configuration key: the nearest by name and by meaning."""
    scores = {entry.path: _similarity(path, entry.path, entry.key.meaning) for entry in config_keys(config)}
    best = max(scores.values())
    if best > 1.05:
        near = sorted((key for key, score in scores.items() if score > best - 0.2), key=lambda key: -scores[key])
        return f"; did you mean {_either(near[:MOST])}?"
    named = dict(sections(config)).get(path.rpartition(".")[0] + ".", config)
    return (
        f"; known are {', '.join(vars(named))}; `oreal config` lists all keys with their meaning, and "
        "docs/start/from_other_trainers.md what verl, slime and NeMo-RL call them"
    )


def _similarity(path: str, key: str, meaning: str) -> float:
    """Return up to 1 for the last names, 0.5 for the whole paths and 1 for words that path and declaration share."""
    names = difflib.SequenceMatcher(None, path.rpartition(".")[2], key.rpartition(".")[2]).ratio()
    paths = difflib.SequenceMatcher(None, path, key).ratio()
    unknown, declared = _words(path), _words(key) | _words(meaning)
    return names + 0.5 * paths + len(unknown & declared) / max(len(unknown), 1)


def _words(text: str) -> set[str]:
    return {word for word in re.split(r"[^a-z0-9]+", text.lower()) if len(word) > 1}


def _either(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
