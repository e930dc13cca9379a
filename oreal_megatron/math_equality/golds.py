r"""Gold answers as data sets give them: solutions with the answer at their end, and text damaged by JSON escapes.

`"\frac12"` with one backslash is a form feed and "rac12" in JSON; such a gold can be matched by no response.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from oreal_megatron.math_equality import extract, lexer

_HASHES = re.compile(r"####[ \t]*(\S[^\n]*?)[ \t]*\n*$")
_TAG = re.compile(r"<answer>\s*(.*?)\s*</answer>\s*$", re.DOTALL | re.IGNORECASE)
_PHRASE = re.compile(r"(?:the|final)\s+answer(?:\s+is|\s*:)", re.IGNORECASE)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
SHORT = 12  # characters of a gold that is no solution
MAX_ANSWER, MAX_WORDS = 300, 30  # characters and words above which a text without a marked answer is a solution
_ONLY_A_BOX = re.compile(r"[\s$]*\\boxed\b.*", re.DOTALL)
_ESCAPED = {"\a": "a", "\b": "b", "\t": "t", "\n": "n", "\v": "v", "\f": "f", "\r": "r"}
_DAMAGED = re.compile(r"([\a\b\t\n\v\f\r])(?!ext\{\d+\})([A-Za-z]+)")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\t(?=ext\\{)")
_SHORT_FRACTION = re.compile(r"\\([dt]?)f(?:r|ra|rc|ac)?(?=\s*\{[^{}]*\}\s*\{)")
_LOST_BACKSLASH = re.compile(r"(?<![\\A-Za-z])(?:(?:[dt]?frac|rac|oxed|inom)(?=\s*[\d{])|ext(?=\{[^\d}]))")
_WITH_BACKSLASH = {"rac": "frac", "oxed": "boxed", "ext": "text", "inom": "binom"}

# placeholders and marks that are no answer; <, = and + may be one, and {} is a set
_NOTHING = re.compile(
    r"(?:[\s?!.,;:'\"`#&*_~|$…–—-]|\\[$#&_ ]|\\(?:boxed|fbox|text[a-z]*|mathrm|mbox)\s*\{\s*\})*|nan|null|n/a",
    re.IGNORECASE,
)
_DANGLING = re.compile(
    r"(?:[\w)}\]]\s*(?:[=/^_*×·÷]|\\(?:times|cdot|div))|\\(?:[dtc]?frac|sqrt|left|[dt]?binom))\s*\$?\s*$"
)
_EMPTY_OPERAND = re.compile(
    r"(?:[\^_]|\\(?:[dtc]?frac|[dt]?binom)(?:\s*\{[^{}]*\})?|\\sqrt\s*(?:\[[^\]]*\])?)\s*\{\s*\}|"
    r"\\(?:[dtc]?frac|[dt]?binom)\s*(?:\{[^{}]*\}|\w)\s*\$?\s*$"
)
_SUSPECT = re.compile(
    r"[\x00-\x1f\x7f]|[#<]|ox|answer|\\[dt]?f[rac]{0,2}\s*\{|(?<![\\dtc])frac|(?<!f)rac|(?<!t)ext\{|(?<!b)inom", re.I
)


class Gold(NamedTuple):
    """A gold answer and what was done to read it: "" (nothing), "solution" or "escapes"."""

    answer: str
    change: str = ""


@lru_cache(maxsize=4096)
def read_gold(text: str) -> Gold:
    """Return the gold answer of a text: behind ####, in the box or tag that ends a solution, with escapes repaired."""
    if not _SUSPECT.search(text):
        return Gold(text)
    repaired = repair_escapes(text)
    answer = _answer_in_solution(repaired)
    if answer is not None:
        return Gold(answer, "solution")
    return Gold(repaired, "escapes" if repaired != text else "")


def is_unusable(text: str) -> bool:
    """Return whether no response can match a gold: lost escapes, a part of an answer, a solution without its answer."""
    return bool(
        _CONTROL.search(text)
        or _NOTHING.fullmatch(text)
        or _is_cut_off(text)
        or len(text) > MAX_ANSWER
        and len(_WORD.findall(text)) > MAX_WORDS
    )


def _is_cut_off(text: str) -> bool:
    """Return whether a text ends within an answer: an operator without its operand, a bracket that is never closed."""
    if _DANGLING.search(text):
        return True
    closed = text + "}" * max(text.count("{") - text.count("}"), 0)
    if closed != text and not closed.rstrip("}").strip("{ ") or _EMPTY_OPERAND.search(closed):
        return True
    if text.count("\\begin{") > text.count("\\end{"):
        return True
    if text.count("\\{") > text.count("\\}") and "\\right." not in text:  # which ends a definition by cases
        return True
    opening, closing = (sum(map(text.count, signs)) for signs in ("([", ")]"))
    return opening > closing and (opening + closing) % 2 == 1  # [3,4[ is an interval


def _answer_in_solution(text: str) -> str | None:
    """Return the answer that a solution ends in; None for a text that is an answer."""
    if (marked := _HASHES.search(text) or _TAG.search(text)) is not None:
        return str(marked.group(1))
    phrases = [match.start() for match in _PHRASE.finditer(text)] if len(text) > SHORT else []
    if phrases and "\\boxed" not in text[phrases[-1] :]:
        extracted = extract.from_text(text[phrases[-1] :])
        return None if extracted is None else extracted.answer
    if "\\boxed" not in text and "\\fbox" not in text or _ONLY_A_BOX.fullmatch(text) and text.count("\\boxed") == 1:
        return None
    boxed = extract.from_boxes(text)
    return None if boxed is None else boxed.joined or boxed.answer


def repair_escapes(text: str) -> str:
    """Return the text with commands instead of the characters that JSON escapes made of them."""
    text = _DAMAGED.sub(_command, text)
    if "\\" in text:
        text = _SHORT_FRACTION.sub(r"\\\1frac", text)
    return _LOST_BACKSLASH.sub(lambda lost: "\\" + _WITH_BACKSLASH.get(lost.group(), lost.group()), text)


def _command(damaged: re.Match[str]) -> str:
    """Return the command that an escape and the letters behind it were, where a command begins so."""
    letters = _ESCAPED[damaged.group(1)] + damaged.group(2)
    if damaged.group(1) in "\n\t" and damaged.group(2) in ("frac", "dfrac"):
        return "\\" + damaged.group(2)  # a tab before a fraction, which was \tfrac, or lost its backslash
    for length in range(len(letters), 1, -1):
        if letters[:length] in lexer.COMMANDS and (length == len(letters) or damaged.group(1) not in "\n\t\r"):
            return "\\" + letters[:length] + (" " if length < len(letters) else "") + letters[length:]
    return damaged.group()
