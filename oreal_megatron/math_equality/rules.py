"""Two answers -> correct or wrong, by rules alone. Pure: no process, no clock, no torch, and no code made of strings.

A text becomes tokens, tokens become a tree of tuples, and the tree is computed by this package's own arithmetic.
Nothing reads a model's text as Python: not here, not in a library (mpmath is handed numbers, never strings).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from oreal_megatron.math_equality import extract
from oreal_megatron.math_equality.compare_answers import Same
from oreal_megatron.math_equality.lexer import ParseError
from oreal_megatron.math_equality.normalise import normalise, unicode_to_latex
from oreal_megatron.math_equality.parser import parse
from oreal_megatron.math_equality.tree import Node

MAX_ANSWER = 20_000  # characters of an answer that is looked at; no gold is longer
MAX_REMEMBERED = 200  # characters of a text whose tree is kept
_INTEGER = re.compile(r"[-+]?\d{1,4000}")
_SPACES = re.compile(r"\s+")
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|textrm|textnormal|mathit|mathsf|emph)\s*\{([^{}]*)\}"
)
_WORDS = re.compile(r"[^\W\d_]+(?:[\s'-]+[^\W\d_]+)*")
_WORD = re.compile(r"[A-Za-z]{3,}|^no$|[^\x00-\x7f]", re.IGNORECASE)  # AB and ab may be two things, No and no are one
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?:\(\s*([A-J])\s*\)|\[\s*([A-J])\s*\]|([A-J])\s*\)?)[.:]?", re.IGNORECASE
)
_LABELLED = re.compile(
    r"\(\s*([A-J])\s*\)[.:]?\s*(\S.*)|([A-J])\s*[).:]\s*(\S.*)|([B-HJ]|A(?=\s+[A-Z]))\s+([A-Z][a-z]+.*)", re.DOTALL
)
_CHOICES = re.compile(r"[(\[{]?\s*[A-J](?:(?:[,;&\s]|and)*[A-J])+\s*[)\]}]?")
_NOT_A_VALUE = re.compile(r"[A-Za-z]{3,}(?![A-Za-z]*[\\{])")
_GROUPED = re.compile(r"\d,\d{3}(?!\d)")
_ZERO_GROUP = re.compile(r",0\d{2}(?!\d)")  # 10,000 is never the list 10, 0
_DECIMAL_COMMA = re.compile(r"[-+]?0,\d{2,}|[-+]?\d+,\d{2}(?=\D*$)")
_MARKS = re.compile(r"\*\*|####|<answer>|答案|\banswer", re.IGNORECASE)
_LONG_WORD = re.compile(r"(?<![A-Za-z\\])(?!and\b|or\b)[A-Za-z]{2,}")
_HALF_DAY = re.compile(r"\s*\b([ap])\.?\s*m\b\.?", re.IGNORECASE)
_LABEL = re.compile(
    r"(?<![A-Za-z])(?:[ap]m|st|nd|rd|th|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|[a-z]{4,})(?![a-z])",
    re.IGNORECASE,
)
_LOOSE_MARK = re.compile(r"(?<!\d)[\s.]|[\s.](?!\d)")  # 5.4 is not 54
_CJK = re.compile(r"[\u3400-\u9fff\uff00-\uffef]")
_CJK_RUN = re.compile(r"[\u3400-\u9fff，,：:\s]*")
_CJK_SO = re.compile(r"(?:因此|所以|故|则|即|综上){0,3}[，,]*")
_CJK_IS = ("答案", "结果", "为", "是", "等于", "得", "选", "：", ":")
_CJK_NOT = re.compile(r"[不非没无否]")


class Graded(NamedTuple):
    """What the rules say of one answer; the parent process makes a Verdict of it."""

    outcome: str  # "correct", "incorrect", "unknown"
    method: str  # "exact", "numeric", "symbolic", "truncated", "no answer", "error"
    extracted: str | None


def grade(gold: str, response: str, finished: bool = True, thinking_end: tuple[str, ...] = ()) -> Graded:
    """Grades a response of the policy: only a box after the thinking counts as its answer."""
    if not finished:
        return Graded("incorrect", "truncated", None)
    found = extract.from_boxes(extract.after_thinking(response, thinking_end))
    return Graded("incorrect", "no answer", None) if found is None else graded(gold, found)


def grade_text(gold: str, text: str) -> Graded:
    """Grades what stands in a file: a bare answer, or a text with the answer in it."""
    found = extract.from_boxes(text)
    if found is None and _is_prose(text):
        found = extract.from_text(text)
        if found is None:
            return Graded("incorrect", "no answer", None)
    return graded(gold, found or extract.Found(text))


def graded(gold: str, found: extract.Found) -> Graded:
    """Compares the answer, or the boxes it ends where there are several."""
    answer = found.together or found.answer
    same, method = equal(gold, answer)
    return Graded("correct" if same else "incorrect", method, answer)


def equals_itself(gold: str) -> bool:
    """Whether a gold answer can be graded at all: its own repetition is correct, also inside a box and past the
    text match."""
    if not gold.strip():
        return False
    graded_box = grade(gold, f"\\boxed{{{gold}}}")
    return graded_box.outcome == "correct"


def trivial(gold: str, answer: str) -> bool | None:
    """Verdict of two whole numbers, or None. Bounded and cheap enough for the caller's own process."""
    if len(gold) < 64 and len(answer) < 64 and gold.isascii() and answer.isascii():
        gold, answer = gold.strip(" $"), answer.strip(" $")
        if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
            return int(gold) == int(answer)
    return None


def equal(gold: str, answer: str) -> tuple[bool, str]:
    """(same answer, how it was decided)."""
    if len(answer) > MAX_ANSWER:
        return False, "exact"
    if (verdict := trivial(gold, answer)) is not None:
        return verdict, "exact"
    gold_text, text = prepared(gold), prepared(answer)
    if squashed(gold_text) == squashed(text):
        return bool(text), "exact"
    if (verdict := same_choice(gold_text, text)) is not None:
        return verdict, "exact"
    if (words := folded(gold_text)) is not None and words == folded(text):
        return True, "exact"
    if is_string(gold_text) and (letters := _unwrapped(text).replace(" ", "")).isalpha():
        return _unwrapped(gold_text) == letters, "exact"
    if (labels := labelled(gold_text)) is not None and labels == labelled(text):
        return True, "exact"
    return same_mathematics(gold_text, text)


def is_string(gold: str) -> bool:
    """HHT, ABCD, \\text{ab}, cat: letters that stand in their order; xy is a product."""
    letters = _unwrapped(gold) if len(gold) < 100 else ""
    written = letters.isupper() or letters != gold.strip() or len(letters) > 2
    return len(letters) > 1 and letters.isascii() and letters.isalpha() and written


def labelled(text: str) -> str | None:
    """Dates, times and ordinals (June 20, 1:03 p.m., 3rd) in one spelling; None for what is not digits and words."""
    plain = _HALF_DAY.sub(r" \1m", _unwrapped(text)) if len(text) < 100 else ""
    if "\\" in plain or not re.search(r"\d", plain) or not _LABEL.search(plain):
        return None
    return _LOOSE_MARK.sub("", plain).casefold()


def prepared(text: str) -> str:
    """Normalised, and without Chinese words around the answer."""
    text = normalise(text)
    return _without_chinese(text) if _CJK.search(text) else text


def _without_chinese(text: str) -> str:
    """Takes phrases such as "the answer is" off the front; words alone, or behind a number (units), stay."""
    run = _CJK_RUN.match(text).group()
    end = max((run.rfind(word) + len(word) for word in _CJK_IS if word in run), default=_CJK_SO.match(text).end())
    rest = text if _CJK_NOT.search(run[:end]) else text[end:].strip()
    rest = re.sub(r"(?<=[\d})])\s*(?:或者|或)\s*", " or ", rest)
    rest = re.sub(r"(?<=[\d})])\s*(?:和|与|及)\s*", " , ", rest)
    return rest or text


def squashed(text: str) -> str:
    """Without the spaces that mean nothing; "5 5" keeps its own."""
    text = _LOOSE_SPACE.sub("", _SPACES.sub(" ", text))
    return text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def _unwrapped(text: str) -> str:
    """Without \\text{...} and its like, three deep."""
    for _ in range(3):
        text = _WRAPPER.sub(r" \1 ", text)
    return text.strip()


def folded(text: str) -> str | None:
    """Words in one case and without spacing; None for what is more than words."""
    if len(text) > 400:
        return None
    text = _SPACES.sub(" ", _unwrapped(text)).strip(" .,;:!\"'*`")
    if not _WORDS.fullmatch(text) or not _WORD.search(text):
        return None
    text = text.casefold()
    text = text.removeprefix("the ").removeprefix("an ").removeprefix("a ")
    text = re.sub(r"[\s-]", "", text)
    return text.removesuffix("s") if len(text) > 7 else text  # no solutions


def _choice(text: str) -> tuple[str, str] | None:
    """(choice letters in order, what stands behind a single one), or None where the text is no choice."""
    if len(text) > 300:
        return None
    text = _SPACES.sub(" ", _unwrapped(text)).strip()
    if (bare := _CHOICE.fullmatch(text)) is not None and bare.group(bare.lastindex).isupper():
        return bare.group(bare.lastindex), ""
    if _CHOICES.fullmatch(text):
        letters = re.findall(r"[A-J]", text)
        listed = letters if text.isalpha() else sorted(letters)  # DBA may be a word; D, B, A are choices
        return ("".join(listed), "") if len(set(letters)) == len(letters) else None
    if (labelled := _LABELLED.fullmatch(text)) is not None:
        letter = next(group for group in labelled.groups()[::2] if group)
        rest = next(group for group in labelled.groups()[1::2] if group)
        return None if re.search(r"\([A-J]\)|^\s*[=<>+*/^_-]", rest) else (letter, rest)
    return None


def same_choice(gold: str, answer: str) -> bool | None:
    """Verdict of two multiple-choice answers: C, (C), \\text{(C)}, "C. 5", "A, B, D". None where one side is none."""
    golds, answers = _choice(gold), _choice(answer)
    if golds is None or answers is None:
        labelled, other = (golds, answer) if golds else (answers, gold)
        if labelled is None or not labelled[1] or _NOT_A_VALUE.search(labelled[1]):
            return None
        return True if same_mathematics(prepared(labelled[1]), other)[0] else None  # "(C) 12" is 12
    if golds[0] == answers[0]:
        return True
    return None if len(golds[0]) > 1 or len(answers[0]) > 1 else False


def same_mathematics(gold: str, answer: str) -> tuple[bool, str]:
    """Compares every reading of one side with the same reading of the other."""
    method = "exact"
    for golds, answers in zip(readings(gold), readings(answer), strict=True):
        for gold_tree in golds:
            for tree in answers:
                same = Same()
                if same.answers(gold_tree, tree):
                    return True, same.method
                method = same.method
    return False, method


def readings(text: str) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Trees of a text: as written, and where it holds a comma in front of three digits, with that comma as a
    separator."""
    first = _tree(text, True)
    plain = () if first is None else (first,)
    if _DECIMAL_COMMA.fullmatch(text) and (decimal := _tree(text.replace(",", "."), True)) is not None:
        plain += (decimal,)
    if not _GROUPED.search(text) or _ZERO_GROUP.search(text):
        return plain, plain
    listed = _tree(text, False)
    return plain, () if listed is None else (listed,)


def _tree(text: str, thousands: bool) -> Node | None:
    return _short_tree(text, thousands) if len(text) <= MAX_REMEMBERED else _parsed(text, thousands)


def _parsed(text: str, thousands: bool) -> Node | None:
    try:
        return parse(text, thousands)
    except ParseError:
        return None  # what a model writes need not be mathematics; it is then compared as text only


# a gold is parsed once for all the answers to its question; long texts are not kept, so that memory stays small
_short_tree = lru_cache(maxsize=1024)(_parsed)


def _is_prose(text: str) -> bool:
    """A sentence with an answer in it, rather than an answer."""
    if _LABELLED.fullmatch(text.strip()):
        return False
    plain = unicode_to_latex(text[:4000])
    if "\n" in plain.strip() or _MARKS.search(plain):
        return True
    if (formula := re.search(r"\$|(?<!\\)\\[(\[]", plain)) is not None and _LONG_WORD.search(plain[: formula.start()]):
        return True
    outside = re.sub(r"\\[A-Za-z]+\s*\{[^{}]*\}|\\[A-Za-z]+", " ", plain)
    words = re.findall(r"(?<![A-Za-z])[A-Za-z]{2,}", outside)
    return len(words) >= 4 or len(words) == 3 and words[-1] in ("is", "are", "equals", "es", "est")
