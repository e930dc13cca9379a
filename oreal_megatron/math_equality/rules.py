"""Decide whether two answers are the same, by rules alone. Pure: no process, no clock, no code made of strings.

A text becomes tokens, tokens become a tree of tuples, and the tree is computed by this package's own arithmetic.
Nothing reads a model's text as Python, neither here nor in a library: mpmath receives numbers, never strings.
"""

from __future__ import annotations

import re
import string
from functools import lru_cache
from typing import NamedTuple

from oreal_megatron.math_equality import extract
from oreal_megatron.math_equality.compare_answers import AnswerComparison
from oreal_megatron.math_equality.compare_values import MAX_WORK
from oreal_megatron.math_equality.golds import is_unusable, read_gold, repair_escapes
from oreal_megatron.math_equality.lexer import ParseError
from oreal_megatron.math_equality.normalise import normalise, unicode_to_latex
from oreal_megatron.math_equality.parser import parse
from oreal_megatron.math_equality.plain_forms import forms
from oreal_megatron.math_equality.tree import Node
from oreal_megatron.math_equality.upright_text import without_text_commands

MAX_ANSWER = 20_000  # characters; a longer answer is incorrect
MAX_FORMS = 4  # of one answer, without the words around it
MAX_FORM_PAIRS = 12  # forms of both sides that are compared
FORM_WORK = 2_000  # nodes visited in one comparison of forms: all of them cost as much as the answers themselves
MAX_CACHED = 200  # characters of a text whose tree is cached
_INTEGER = re.compile(r"[-+]?\d{1,4000}")
_SPACES = re.compile(r"\s+")
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")
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
_CYCLE = re.compile(r"(-?\d*\.\d+)\((\d{1,18})\)")  # 0.1(6)
_DECIMAL_COMMA = re.compile(r"[-+]?0,\d{2,}|[-+]?\d+,\d{2}(?=\D*$)")
_MARKS = re.compile(r"\*\*|__\w|####|<answer>|答案|\banswer", re.IGNORECASE)
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
    """Result of the rules for one answer."""

    outcome: str  # "correct", "incorrect", "unknown"
    method: str  # "exact", "numeric", "symbolic", "truncated", "no answer", "error"
    extracted: str | None


def grade(gold: str, response: str, finished: bool = True, thinking_end: tuple[str, ...] = ()) -> Graded:
    """Grade a response of the policy: only a box after the thinking counts as its answer."""
    if not finished:
        return Graded("incorrect", "truncated", None)
    extracted = extract.from_boxes(extract.after_thinking(response, thinking_end))
    return Graded("incorrect", "no answer", None) if extracted is None else grade_extracted(gold, extracted)


def grade_text(gold: str, text: str) -> Graded:
    """Grade the text of a file: a bare answer, or a text with the answer in it."""
    extracted = extract.from_boxes(text)
    if extracted is None and _is_prose(text):
        extracted = extract.from_text(text)
        if extracted is None:
            return Graded("incorrect", "no answer", None)
    return grade_extracted(gold, extracted or extract.ExtractedAnswer(text))


def grade_extracted(gold: str, extracted: extract.ExtractedAnswer) -> Graded:
    """Compare the answer with the gold; where several boxes are joined, their list."""
    answer = extracted.joined or extracted.answer
    same, method = equal(gold, answer)
    return Graded("correct" if same else "incorrect", method, answer)


def equals_itself(gold: str) -> bool:
    """Return whether a gold answer can be graded: its own repetition in a box is correct.

    Damaged text and solutions without a recognisable answer are no golds, though they repeat themselves.
    """
    gold = read_gold(gold).answer
    return bool(gold.strip()) and not is_unusable(gold) and grade(gold, f"\\boxed{{{gold}}}").outcome == "correct"


def compare_integers(gold: str, answer: str) -> bool | None:
    """Return whether two integers are equal, or None for other texts. Cheap enough for the caller's own process."""
    if len(gold) < 64 and len(answer) < 64 and gold.isascii() and answer.isascii():
        gold, answer = gold.strip(" $"), answer.strip(" $")
        if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
            return int(gold) == int(answer)
    return None


def equal(gold: str, answer: str) -> tuple[bool, str]:
    """Return (whether the answers are the same, the method: "exact", "numeric" or "symbolic")."""
    if len(answer) > MAX_ANSWER:
        return False, "exact"
    if (same := compare_integers(gold, answer)) is not None:
        return same, "exact"
    gold, change = read_gold(gold)
    gold_text, text = prepare(gold), prepare(repair_escapes(answer) if change == "escapes" else answer)
    same, method = compare_texts(gold_text, text)
    return (True, method) if same or compare_forms(gold_text, text) else (False, method)


def compare_texts(gold_text: str, text: str, work: int = MAX_WORK) -> tuple[bool, str]:
    """Compare two normalised answers as they are written; return (same, method)."""
    if without_loose_spaces(gold_text) == without_loose_spaces(text):
        return bool(text), "exact"
    if (same := compare_choices(gold_text, text)) is not None:
        return same, "exact"
    if (words := fold_words(gold_text)) is not None and words == fold_words(text):
        return True, "exact"
    if "and" in gold_text and (names := _names(gold_text)) is not None and names == _names(text):
        return True, "exact"
    if is_string(gold_text) and (letters := without_text_commands(text).replace(" ", "")).isalpha():
        return without_text_commands(gold_text) == letters, "exact"
    if (date := fold_date(gold_text)) is not None and date == fold_date(text):
        return True, "exact"
    return compare_expressions(gold_text, text, work)


def is_string(gold: str) -> bool:
    r"""Return whether a gold is letters whose order matters: HHT, ABCD, \text{ab}, cat; xy is a product."""
    letters = without_text_commands(gold) if len(gold) < 100 else ""
    is_word = letters.isupper() or letters != gold.strip() or len(letters) > 2 and not _is_product(letters)
    return len(letters) > 1 and letters.isascii() and letters.isalpha() and is_word


def _is_product(letters: str) -> bool:
    """Return whether small letters are no word: different ones without a vowel (pqr), or neighbours (abc)."""
    if not letters.islower() or len(set(letters)) < len(letters):
        return False
    return not set(letters) & set("aeiouy") or "".join(sorted(letters)) in string.ascii_lowercase


def _names(text: str) -> list[str] | None:
    """Return the words that "and" or commas join, in one order: Alice and Bob; None for other texts."""
    parts = re.split(r"\s*(?:,\s*and\b|,|\band\b)\s*", without_text_commands(text)) if len(text) < 400 else []
    names = [fold_words(part) for part in parts]
    return sorted(name for name in names if name) if len(names) > 1 and None not in names else None


def fold_date(text: str) -> str | None:
    """Return one spelling of a date, time or ordinal (June 20, 1:03 p.m., 3rd); None for other texts."""
    plain = _HALF_DAY.sub(r" \1m", without_text_commands(text)) if len(text) < 100 else ""
    if "\\" in plain or not re.search(r"\d", plain) or not _LABEL.search(plain):
        return None
    return _LOOSE_MARK.sub("", plain).casefold()


def prepare(text: str) -> str:
    """Normalise a text and remove Chinese words around the answer."""
    text = normalise(text)
    return _without_chinese(text) if _CJK.search(text) else text


def _without_chinese(text: str) -> str:
    """Remove phrases such as "the answer is" from the front; words alone, or behind a number (units), stay."""
    run_match, therefore = _CJK_RUN.match(text), _CJK_SO.match(text)
    run, end = run_match.group() if run_match else "", therefore.end() if therefore else 0
    end = max((run.rfind(word) + len(word) for word in _CJK_IS if word in run), default=end)
    answer = text if _CJK_NOT.search(run[:end]) else text[end:].strip()
    answer = re.sub(r"(?<=[\d})])\s*(?:或者|或)\s*", " or ", answer)
    answer = re.sub(r"(?<=[\d})])\s*(?:和|与|及)\s*", " , ", answer)
    return answer or text


def without_loose_spaces(text: str) -> str:
    """Remove the spaces that mean nothing; the one in "5 5" stays."""
    text = _LOOSE_SPACE.sub("", _SPACES.sub(" ", text))
    return text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def fold_words(text: str) -> str | None:
    """Return words in lower case without spaces, article and plural; None for texts of more than words."""
    if len(text) > 400:
        return None
    text = _SPACES.sub(" ", without_text_commands(text)).strip(" .,;:!\"'*`")
    if not _WORDS.fullmatch(text) or not _WORD.search(text):
        return None
    text = text.casefold()
    text = text.removeprefix("the ").removeprefix("an ").removeprefix("a ")
    text = re.sub(r"[\s-]", "", text)
    return text.removesuffix("s") if len(text) > 7 else text  # no solutions


def _choice(text: str) -> tuple[str, str] | None:
    """Return (choice letters in order, the value behind a single one), or None where the text is no choice."""
    if len(text) > 300:
        return None
    text = _SPACES.sub(" ", without_text_commands(text)).strip()
    if (bare := _CHOICE.fullmatch(text)) is not None and (letter := bare.group(bare.lastindex or 0)).isupper():
        return letter, ""
    if _CHOICES.fullmatch(text):
        letters = re.findall(r"[A-J]", text)
        listed = letters if text.isalpha() else sorted(letters)  # DBA may be a word; D, B, A are choices
        return ("".join(listed), "") if len(set(letters)) == len(letters) else None
    if (labelled := _LABELLED.fullmatch(text)) is not None:
        letter = next(group for group in labelled.groups()[::2] if group)
        value = next(group for group in labelled.groups()[1::2] if group)
        return None if re.search(r"\([A-J]\)|^\s*[=<>+*/^_-]", value) else (letter, value)
    return None


def compare_choices(gold: str, answer: str) -> bool | None:
    r"""Compare two multiple-choice answers: C, (C), \text{(C)}, "C. 5", "A, B, D". None where a side is no choice."""
    golds, answers = _choice(gold), _choice(answer)
    if golds is None or answers is None:
        labelled, other = (golds, answer) if golds else (answers, gold)
        if labelled is None or not labelled[1] or _NOT_A_VALUE.search(labelled[1]):
            return None
        return True if compare_expressions(prepare(labelled[1]), other)[0] else None  # "(C) 12" is 12
    if golds[0] == answers[0]:
        return True
    return None if len(golds[0]) > 1 or len(answers[0]) > 1 else False


def compare_expressions(gold: str, answer: str, work: int = MAX_WORK) -> tuple[bool, str]:
    """Compare every reading of one side with the same reading of the other; return (same, method)."""
    method = "exact"
    for golds, answers in zip(readings(gold), readings(answer), strict=True):
        for gold_tree in golds:
            for tree in answers:
                comparison = AnswerComparison(work)
                if comparison.answers(gold_tree, tree):
                    return True, comparison.method
                method = comparison.method
    return False, method


def compare_forms(gold: str, answer: str) -> bool:
    """Return whether the answers are the same without the words around them, such as "The answer is"."""
    golds, answers = answers_of(gold), answers_of(answer)
    pairs = [(g, a) for g in golds for a in answers][1 : MAX_FORM_PAIRS + 1]  # the first are the texts themselves
    return any(compare_texts(g, a, FORM_WORK)[0] for g, a in pairs)


def answers_of(text: str) -> list[str]:
    """Return the text and its forms without words around it, as far as what they add is right."""
    answers = [text]
    for answer in answers:
        if len(answers) > MAX_FORMS:
            break
        for form in forms(answer):
            head = prepare(form.answer)
            if head and head not in answers and _holds(head, form.relation, prepare(form.other)):
                answers.append(head)
    return answers


def _holds(answer: str, relation: str, other: str) -> bool:
    """Return whether what a form adds agrees with its answer: an equal value, a rounding, or a value it denies."""
    if relation == "rounding":
        exact, rounding = _tree(answer, True), _tree(other, True)
        return exact is not None and rounding is not None and AnswerComparison(FORM_WORK).is_rounding(exact, rounding)
    return not relation or compare_texts(answer, other, FORM_WORK)[0] == (relation == "same")


def readings(text: str) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Return the trees of a text: as written, and with a comma before three digits as a separator.

    The second are the same as the first where the text has no such comma.
    """
    first = _tree(text, True)
    plain: tuple[Node, ...] = () if first is None else (first,)
    if (cycle := _CYCLE.fullmatch(text)) is not None:
        repeating = _tree(rf"{cycle[1]}\overline{{{cycle[2]}}}", True)
        plain += () if repeating is None else (repeating,)
    if _DECIMAL_COMMA.fullmatch(text) and (decimal := _tree(text.replace(",", "."), True)) is not None:
        plain += (decimal,)
    if not _GROUPED.search(text) or _ZERO_GROUP.search(text):
        return plain, plain
    listed = _tree(text, False)
    return plain, () if listed is None else (listed,)


def _tree(text: str, thousands: bool) -> Node | None:
    return _short_tree(text, thousands) if len(text) <= MAX_CACHED else _parsed(text, thousands)


def _parsed(text: str, thousands: bool) -> Node | None:
    try:
        return parse(text, thousands)
    except ParseError:
        return None  # a model may write anything; without a tree it is compared as text only


# a gold is parsed once for all responses to its question; long texts are not cached, so that memory stays small
_short_tree = lru_cache(maxsize=1024)(_parsed)


def _is_prose(text: str) -> bool:
    """Return whether a text is prose with an answer in it, rather than an answer."""
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
