r"""Parts of \text{...} and similar commands: numbers with their units, and the words around them."""

from __future__ import annotations

import re

_POWER = r"(?:\s*\^\s*\{?\d\}?)?"
_WORD = re.compile(
    rf"(?<![\\A-Za-z])[A-Za-z]{{2,}}|(?<=\s)[A-Za-z]{_POWER}(?:[/ ][A-Za-z]{{1,3}}{_POWER}){{0,3}}\s*$|"
    r"(?<=\d)\s*°|[^\x00-\x7f]"
)
_STARTS = re.compile(r"\\?[-+(.\d]|\\(?:frac|sqrt|currency|pi)|\\[dt]frac|\$")
_ENDS = re.compile(r"(?:[\d)}%!]|\\pi|[A-Za-z])\s*$")
_JOINED = re.compile(r"(and|or)\s+(?=[-+\d\\])")
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|textrm|textnormal|mathit|mathsf|emph)\s*\{([^{}]*)\}"
)
MAX_ITEMS = 8  # numbers in one text


def measured(inner: str) -> list[tuple[str, str]] | None:
    r"""Split "12 students", "-4 degrees", "2 and 3" into parts: ("math", text), ("sep", "and"), ("word", text).

    None where the text does not begin with a number or formula.
    """
    parts: list[tuple[str, str]] = []
    remaining = inner.strip()
    for _ in range(MAX_ITEMS):
        if not _STARTS.match(remaining) or not re.search(r"\d|\\pi|\\sqrt", remaining):
            return None
        word = _WORD.search(remaining)
        formula = remaining[: word.start()] if word else remaining
        if (
            not _ENDS.search(formula)
            or formula.count("(") != formula.count(")")
            or formula.count("{") != formula.count("}")
        ):
            return None
        parts.append(("math", formula.rstrip(" ,") if word else formula))
        if word is None:
            return parts
        remaining = remaining[word.start() :]
        joined = _JOINED.match(remaining)
        if joined is None:
            return [*parts, ("word", remaining.strip())]
        parts.append(("sep", joined.group(1)))
        remaining = remaining[joined.end() :]
    return None


def without_text_commands(text: str) -> str:
    r"""Remove \text{...} and similar commands, up to three within each other."""
    for _ in range(3):
        text = _WRAPPER.sub(r" \1 ", text)
    return text.strip()
