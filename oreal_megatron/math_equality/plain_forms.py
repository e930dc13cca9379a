r"""Answers with words around them: "The answer is 16", "5, not 6", "12\pi (approximately 37.7)", "413_5 (base 5)".

A form is an answer without such words, and what must hold for it: a rounding must be that of the answer, an alternative
must be equal to it. Texts are short here; every pattern is anchored and linear or bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from oreal_megatron.math_equality.upright_text import without_text_commands

MAX_CHARS = 300  # of an answer whose words are read
_HINT = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2}|\\(?:approx|simeq|in|text|mathrm|mbox)(?![A-Za-z])|\(\s*=")
_VERB = r"(?:is|are|equals|equal|becomes|be|=)(?:\s+(?:equal\s+to|exactly|simply|therefore|just))?"
_PREFIX = re.compile(
    rf"(?P<words>[A-Za-z][A-Za-z ,']{{0,80}}?)\s*(?:(?<![A-Za-z]){_VERB}(?![A-Za-z])\s*:?|:)\s*(?P<answer>\S.*)",
    re.DOTALL,
)
_CONNECTIVE = re.compile(
    r"(?:so|thus|hence|therefore|then|finally|and so|we\s+(?:get|have|find|obtain|conclude)|answer|final answer)"
    r"(?:\s+that)?\s*[,:]?\s+(?P<answer>\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_STARTERS = frozenset("ans the so thus hence therefore our my it its this that there answer final result we value then "
                      "total correct required".split())  # fmt: skip
_CHANGES = re.compile(
    r"\b(?:not|never|no|none|wrong|incorrect|false|except|unless|if|without|half|third|quarter|fifth|tenth|twice|double|triple|"
    r"squared?\s+(?:root|of)|squared|cubed?\s+(?:root|of)|cubed|log\w*|powers?|exponents?|negative|opposite|reciprocal|inverse|"
    r"complement|minus|plus|less|more|fewer|than|over|under|above|below|times|percent\w*|hundred|thousand|million|billion|"
    r"dozen|approximately|about|roughly|around|nearly|other|first|second)\b|n't"
)
_SUFFIX = re.compile(
    r"(?P<answer>.{1,200}?)\s*,?\s+(?:is|are)\s+(?:the|our|my)\s+(?:(?:final|correct|required|desired|only)\s+)?"
    r"(?:answer|result|solution|value)s?",
    re.IGNORECASE | re.DOTALL,
)
_NOT = re.compile(
    r"(?P<answer>[^,]{1,100}?)(?:\s*,\s*(?:and\s+|but\s+)?|\s+(?:but|and)\s+|\s*\(\s*)(?:not|rather than|instead of)\s+"
    r"(?P<other>[^A-Za-z]{1,40}|[A-Za-z])\)?",
    re.IGNORECASE,
)
_INSTEAD = re.compile(
    r"(?P<answer>[^,]{1,100}?)\s+(?:rather than|instead of)\s+(?P<other>[^A-Za-z]{1,40}|[A-Za-z])", re.IGNORECASE
)
_ABOUT = r"(?:approximately|approx\.?|about|roughly|nearly|around|\\approx|\\simeq|~)"
_SAME = r"(?:or\s+equivalently|or|i\.e\.|that\s+is|equivalently|which\s+(?:is|equals)|=|also)"
_IN_BRACKETS = re.compile(
    rf"(?P<answer>[^()]*(?:\([^()]*\)[^()]*){{0,8}}?)\s*,?\s*\(\s*(?P<word>(?:{_SAME}\s*,?\s*)?{_ABOUT}|{_SAME})\s*,?\s*"
    r"(?P<other>[^()]{1,80}(?:\([^()]{0,40}\)[^()]{0,40})?)\)"
)
_BEHIND = re.compile(
    rf"(?P<answer>.{{1,200}}?)\s*(?:,\s*|\s)(?P<word>(?:{_SAME}\s*,?\s*)?(?<![A-Za-z]){_ABOUT}|{_SAME})\s*,?\s+(?P<other>.{{1,80}})",
    re.DOTALL,
)
_REASON = re.compile(
    r"(?P<answer>[^()]{1,200}?)\s*\(\s*(?:since|because|as|see|in\s+(?:simplest|lowest|reduced)|simplified|exact|by|after|units?|final|"
    r"in\s+(?:cm|m|km|degrees|radians|dollars|units))\b[^()]{0,80}\)"
)
_BASE = re.compile(
    r"(?P<digits>\w{1,60}?)(?:_\{?(?P<base>\d{1,2})\}?)?\s*\(?\s*(?:in\s+)?base[\s-]+(?P<named>\w{1,7})\s*\)?"
)
_PARAMETER = re.compile(
    r"(?P<answer>.{1,200}?)\s*[,;]?\s*\(?\s*(?:(?:where|for|with)\s+)?(?:(?:all|any|some|every|an?|each)\s+)?"
    r"(?:integers?\s+(?P<a>[a-z])(?![A-Za-z])|(?P<b>[a-z])\s*\\in\s*\\mathbb\s*\{?\s*Z\s*\}?|"
    r"(?P<c>[a-z])\s+(?:is\s+)?(?:an?\s+|any\s+)?integer)\s*\)?",
    re.DOTALL,
)


class Form(NamedTuple):
    """An answer without the words around it, and what must hold: `same`, `rounding` or `different` of `other`."""

    answer: str
    relation: str = ""
    other: str = ""


def forms(text: str) -> Iterator[Form]:
    """Yield the forms of a normalised answer that has words around it; none for most answers."""
    if len(text) > MAX_CHARS or not _HINT.search(text):
        return
    text = re.sub(r"\s+", " ", without_text_commands(text)).strip(" .,")
    yield from _sentences(text)
    for pattern in (_NOT, _INSTEAD):
        if (match := pattern.fullmatch(text)) is not None:
            yield Form(match["answer"], "different", match["other"])
    if (match := _REASON.fullmatch(text)) is not None:
        yield Form(match["answer"])
    if (match := _BASE.fullmatch(text)) is not None:
        yield Form(*_with_base(match))
    for pattern in (_IN_BRACKETS, _BEHIND):
        if (match := pattern.fullmatch(text)) is not None and match["answer"].strip():
            rounding = re.search(rf"{_ABOUT}$", match["word"]) is not None
            yield Form(match["answer"], "rounding" if rounding else "same", match["other"])
    if (match := _PARAMETER.fullmatch(text)) is not None and "\\in" not in match["answer"]:
        letter = match["a"] or match["b"] or match["c"]
        yield Form(f"{match['answer']}, {letter} \\in \\mathbb{{Z}}")


def _sentences(text: str) -> Iterator[Form]:
    """Yield the answer of a clause: "The area is 16", "Thus, 16", "16 is the answer"."""
    if (match := _PREFIX.fullmatch(text)) is not None:
        words = match["words"].lower().replace(",", " ")
        if (words.split()[0] in _STARTERS or len(words) == 1) and not _CHANGES.search(words):
            yield Form(match["answer"])
    for pattern in (_CONNECTIVE, _SUFFIX):
        if (match := pattern.fullmatch(text)) is not None:
            yield Form(match["answer"])


def _with_base(match: re.Match[str]) -> tuple[str]:
    """Return a numeral with the base of its remark; the text unchanged where the two differ."""
    named = match["named"]
    alike = match["base"] in (None, named) or not named.isdigit()
    base = named if named.isdigit() else rf"\text{{{named}}}"
    return (f"{match['digits']}_{{{match['base'] or base}}}" if alike else match.group(),)
