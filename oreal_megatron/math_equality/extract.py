"""Find the answer in a response.

Training reads boxes only (`from_boxes`); `from_text` also reads phrases, for files of plain answers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from oreal_megatron.math_equality.normalise import closing_braces

MAX_BOXES = 64  # read at the end of a response
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?:\{|(?=[A-Za-z0-9\\]))")
MAX_UNCLOSED = 2000  # characters read of a box that is never closed
_LINE_END = re.compile(r"\n|\$|\\\)|\\\]")
_BARE = re.compile(r"\\[A-Za-z]+|[A-Za-z0-9]")
_JOIN = re.compile(r"(?:[\s$,;.&]|\\\\|\\q?quad|\\[,;:!()\[\]]|\\text\{[^{}]{0,40}\}|\band\b|\bor\b|和|与|、|，|；"
                   r"|[A-Za-z](?:_\{?\w{1,3}\}?)?\s*=){1,40}")  # fmt: skip
_JOIN_WORD = re.compile(r"[,;，；、和与]|\band\b|\bor\b")
_PHRASE = re.compile(
    r"(?:final\s+answer|correct\s+answer|correct\s+option|correct\s+choice|answer|答案)"
    r"(?:\s*\([^()]{0,40}\))?\s*(?:is(?:\s+for\s+sure)?|are|[:：=]|为|是|选)+\s*[:：]?\s*(?:option\s+|choice\s+)?",
    re.IGNORECASE,
)
_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$((?:[^$\\]|\\.)+?)(?<!\\)\$", re.DOTALL)
_BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"####\s*(\S[^\n]*)\s*$")
_SENTENCE_END = re.compile(r"(?<=[^\d\s])\.(?:\s|$)|\.\s+(?=[A-Z*<])|\.?\s*$|\n|<\|")
_CLOSING = re.compile(
    r"(?:\bis|\bes|\best|\bare|\bequals|\bbe|\bby|=|\bit'?s|\bthink it's)\s*(?:approximately\s+|about\s+)?"
    r"([-+]?[$€£]?[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?\s*\\?%?|\(?[A-F]\)?(?=\W*$))[^\d]*$"
)
_LETTER = re.compile(r"\*{0,2}\(?([A-J])\)?\*{0,2}(?=\s*(?:[,.;:]|$))")
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?![\w.]*\w)")
_NO_ANSWER = re.compile(
    r"\b(?:don'?t|do not|cannot|can'?t|could not|couldn'?t|unable|not sure|no idea)\b[^.]{0,30}"
    r"\b(?:know|solve|determine|answer|sure|find|idea)\b", re.IGNORECASE)  # fmt: skip
_FOLLOW_UP = re.compile(r"\s*(?:I hope it is correct\.?|<\|[a-z_]+\|>\s*\w*)\s*$")


@dataclass(frozen=True, slots=True)
class ExtractedAnswer:
    """The last box of a response, and the list it ends where several boxes are joined by commas or "and"."""

    answer: str
    joined: str | None = None  # "1 , 2" for "\\boxed{1} and \\boxed{2}"


def after_thinking(response: str, thinking_end: tuple[str, ...]) -> str:
    """Return the text behind the last of the words that end the thinking; the response itself without any."""
    start = max((at + len(word) for word in thinking_end if word and (at := response.rfind(word)) >= 0), default=0)
    return response[start:]


def _box_at(text: str, box: re.Match[str], closing: dict[int, int]) -> tuple[str, int]:
    """Return content and end of one box. One that is never closed runs to the end of its line."""
    if text[box.end() - 1] != "{":
        bare = _BARE.match(text, box.end())
        return (bare.group(), bare.end()) if bare else ("", box.end())
    end = closing.get(box.end() - 1, -1)
    if end >= 0:
        return text[box.end() : end], end + 1
    stop = _LINE_END.search(text, box.end(), box.end() + MAX_UNCLOSED)
    stop_at = stop.start() if stop else min(len(text), box.end() + MAX_UNCLOSED)
    return text[box.end() : stop_at], stop_at


def boxes(text: str, limit: int = MAX_BOXES) -> list[tuple[str, int, int]]:
    """Return (content, start, end) of the last `limit` outermost boxes that are not empty, in order."""
    starts = list(_BOX.finditer(text))[-4 * limit :]
    if not starts:
        return []
    closing = closing_braces(text, starts[0].start())
    filled: list[tuple[str, int, int]] = []
    for box in starts:
        if filled and box.start() < filled[-1][2]:
            continue  # a box within a box
        content, end = _box_at(text, box, closing)
        if content.strip(" $.,\t\n"):
            filled.append((content, box.start(), end))
    return filled[-limit:]


def from_boxes(text: str) -> ExtractedAnswer | None:
    """Return the last box, and the list of boxes joined to it by commas or "and"; None without a box."""
    filled = boxes(text)
    if not filled:
        return None
    joined = [filled[-1]]
    for box in reversed(filled[:-1]):
        between = text[box[2] : joined[0][1]]
        if not (_JOIN.fullmatch(between) and _JOIN_WORD.search(between)):
            break
        joined.insert(0, box)
    several = " , ".join(content for content, _, _ in joined) if len(joined) > 1 else None
    return ExtractedAnswer(filled[-1][0], several)


def _clause(text: str) -> str:
    """Return the answer at the start of `text`, up to the end of its sentence."""
    if choice := _LETTER.match(text):
        return choice.group(1)
    if math := _MATH.match(text):
        tail = text[math.end() : math.end() + 12]
        return math.group() + (unit.group() if (unit := re.match(r"\s*(?:%|percent|pct)", tail)) else "")
    end = _SENTENCE_END.search(text)
    return text[: end.start() if end else len(text)].strip(" *")


def _answer_of_clause(clause: str) -> str:
    """Return the answer behind "the answer is": its closing number, its only number, or all of it."""
    if " " not in clause:
        return clause
    if closing := _CLOSING.search(clause):
        return closing.group(1)
    numbers = _NUMBER.findall(clause)
    sentence = len(re.findall(r"[A-Za-z]{3,}", clause)) > 3 and not re.search(r"[\\$=<>]", clause)
    return numbers[0] if sentence and len(numbers) == 1 else clause


def _last_math(text: str) -> str | None:
    formulas = _MATH.findall(text)
    return "".join(formulas[-1]) if formulas else None


def from_text(text: str) -> ExtractedAnswer | None:
    """Return the first of: box, tag, "the answer is ...", bold text, closing number, last formula; or None."""
    if boxed := from_boxes(text):
        return boxed
    text = text[-4000:]  # phrases stand at the end; the searches below stay short
    while (shorter := _FOLLOW_UP.sub("", text)) != text:
        text = shorter
    if tag := _TAG.search(text) or _HASHES.search(text):
        return ExtractedAnswer(tag.group(1))
    phrases = list(_PHRASE.finditer(text))
    if phrases and (clause := _clause(text[phrases[-1].end() :])):
        return ExtractedAnswer(_answer_of_clause(clause))
    if _NO_ANSWER.search(text):
        return None
    if bold := _BOLD.findall(text):
        return ExtractedAnswer(bold[-1])
    closing = _CLOSING.search(text.rstrip(" .*")[-200:])
    if closing and not re.search(r"\$|\\\)", closing.group()[len(closing.group(1)) :]):
        return ExtractedAnswer(closing.group(1))
    formula = _last_math(text)
    return None if formula is None else ExtractedAnswer(formula)
