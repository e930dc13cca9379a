r"""Letters whose order matters: \angle ABC, \overrightarrow{AB}, \overline{ab} (digits), \vec a \times \vec b."""

from __future__ import annotations

import re

_MARKS = {
    "overrightarrow": "vec", "vec": "vec", "overline": "overline", "bar": "overline", "widehat": "hat", "hat": "hat",
    "overarc": "arc", "wideparen": "arc", "angle": "angle", "measuredangle": "angle", "sphericalangle": "angle",
    "triangle": "triangle", "square": "square", "overleftrightarrow": "line",
}  # fmt: skip
_BARE = frozenset(("angle", "triangle", "square"))  # marks whose letters need no braces
_POINT = r"[A-Za-z0-9]'*(?:_\{?[A-Za-z0-9]\}?)?"
_IN_BRACES = re.compile(r"\s*\{((?:[^{}]|\{[^{}]{0,20}\}){2,60})\}")
_BEHIND = re.compile(r"\s*((?:[A-Z]'*(?:_\{?[0-9]\}?)?\s*){2,6})(?![a-z])")
_STYLE = re.compile(r"\\(?:mathrm|mathbf|mathit|text)(?![A-Za-z])|[\s{}]")
_POINTS = re.compile(rf"(?:{_POINT}){{2,12}}")
_VECTOR = (
    r"\\(?:vec|mathbf|boldsymbol|bm|overrightarrow|hat)\s*(?:\{\s*[A-Za-z][A-Za-z0-9_']{0,8}\s*\}|[A-Za-z](?![A-Za-z]))"
)
_VECTOR_BEFORE = re.compile(rf"{_VECTOR}(?:_\{{?\w\}}?)?\s*$")
_VECTOR_BEHIND = re.compile(rf"\s*(?:\d+\s*)?{_VECTOR}")
_SIDE = 80  # characters read on each side of a product sign


def marked_letters(name: str, text: str, at: int) -> tuple[str, str, int] | None:
    r"""Return (mark, letters, end) for the command `name` whose argument begins at `at`; None where it is no such mark.

    Letters that mean the same from either end (an angle, a segment, an arc) get one spelling.
    """
    if name not in _MARKS:
        return None
    mark = _MARKS[name]
    argument = _IN_BRACES.match(text, at) or (_BEHIND.match(text, at) if mark in _BARE else None)
    letters = _STYLE.sub("", argument.group(1)) if argument else ""
    if argument is None or not _POINTS.fullmatch(letters) or not re.search(r"[A-Za-z]", letters):
        return None
    points = re.findall(_POINT, letters)
    if len(points) < 2:
        return None
    segment = len(points) == 2 and letters.isupper() and mark in ("overline", "line", "arc", "hat")
    if segment or mark in ("angle", "hat", "arc"):
        points = min(points, points[::-1])
    return mark, "".join(points), argument.end()


def is_vector_product(text: str, start: int, end: int) -> bool:
    r"""Return whether the \times at text[start:end] stands between two vectors, or a vector and a bracket."""
    before, behind = text[max(0, start - _SIDE) : start].rstrip(), text[end : end + _SIDE]
    left, right = bool(_VECTOR_BEFORE.search(before)), bool(_VECTOR_BEHIND.match(behind))
    return left and right or left and behind.lstrip()[:1] == "(" or right and before[-1:] == ")"
