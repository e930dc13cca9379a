"""Gold answers of a data file: taken out of solutions, repaired where JSON escapes damaged them, reported by line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import lru_cache

from oreal_megatron.math_equality import Gold
from oreal_megatron.runtime import distributed

log = logging.getLogger(__name__)
_CHANGES = {
    "solution": "are whole solutions; the answer at their end is taken as the gold answer",
    "escapes": "were damaged by JSON escapes (\\f is a form feed) and are read as commands again; write \\\\frac",
}


def report_changes(path: str, golds: dict[int, tuple[str, Gold]], ranges: Callable[[Iterable[int]], str]) -> None:
    """Log, once and on the first rank, which golds were not taken as they are: line number -> (text, gold)."""
    for change, sentence in _CHANGES.items():
        lines = [number for number, (_, gold) in golds.items() if gold.change == change]
        if lines and distributed.rank() == 0:
            text, gold = golds[lines[0]]
            example = f"line {lines[0]}: {text[-60:]!r} is read as {gold.answer!r}"
            _warn_once(f"{path}: {len(lines)} gold answers {sentence} (line {ranges(lines)}; {example})")


@lru_cache(maxsize=256)
def _warn_once(text: str) -> None:
    log.warning("%s", text)
