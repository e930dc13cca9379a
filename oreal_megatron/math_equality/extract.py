"""Find the answer in a response.

Training reads boxes only (`from_boxes`); `from_text` also reads phrases, for files of plain answers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from oreal_megatron.math_equality import box_context
from oreal_megatron.math_equality.normalise import closing_braces

MAX_BOXES = 64  # read at the end of a response
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?:\{|(?=[A-Za-z0-9\\]))")
MAX_UNCLOSED = 2000  # characters read of a box that is never closed
_LINE_END = re.compile(r"\n|\$|\\\)|\\\]")
_BARE = re.compile(r"\\[A-Za-z]+|[A-Za-z0-9]")
_JOIN = re.compile(r"(?:[\s$,;.&]|\\\\|\\q?quad|\\[,;:!()\[\]]|\\text\{[^{}]{0,40}\}|\band\b|\bor\b|和|与|、|，|；"
                   r"|[A-Za-z](?:_\{?\w{1,3}\}?)?\s*=){1,40}[-+−]?[\s$]{0,4}")  # fmt: skip
_JOIN_WORD = re.compile(r"[,;，；、和与]|\band\b|\bor\b")
_PHRASE = re.compile(
    r"(?:final\s+answer|correct\s+answer|correct\s+option|correct\s+choice|answer|答案)"
    r"(?:\s*\([^()]{0,40}\))?\s*(?:is(?:\s+for\s+sure)?|are|[:：=]|为|是|选)+\s*[:：]?\s*(?:option\s+|choice\s+)?",
    re.IGNORECASE,
)
_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$((?:[^$\\]|\\.)+?)(?<!\\)\$", re.DOTALL)
_BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
_LABEL_COLON = re.compile(r"(?:\*{1,3}|__)([^*_\n]{1,60}?)\s*(?:\*{1,3}|__)[ \t]*[:：]")
_LABEL_LINE = re.compile(
    r"^[ \t]*(?:#{1,6}[ \t]*)?(?:\*{1,3}|__)?[ \t]*((?:final|my|the)?[ \t]*(?:answer|solution|result|conclusion)|答案)"
    r"[ \t]*(?:\*{1,3}|__)?[ \t]*[:：]?[ \t]*\n\s*(?=\S)",
    re.IGNORECASE | re.MULTILINE,
)
_LABEL_WORDS = re.compile(
    r"\s*(?:step|case|part|method|note|problem|question|given|check|verification|proof|explanation|summary|approach|analysis|"
    r"calculation|reasoning|setup|solution|conclusion|(?:final\s+)?answer)s?\b",
    re.IGNORECASE,
)
_LABEL_ONLY = re.compile(r"^[ \t]*(?:\*{1,3}|__)[^*_\n]{1,60}[:：][ \t]*(?:\*{1,3}|__)[ \t.]*\n", re.MULTILINE)
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
    """The last box of a response with the operators around it, and the list it ends where several boxes are joined."""

    answer: str
    joined: str | None = None  # "1 , 2" for "\\boxed{1} and \\boxed{2}"


def after_thinking(response: str, thinking_end: tuple[str, ...]) -> str:
    """Return the text behind the last of the words that end the thinking; the response itself without any.

    Thinking that begins and never ends has no answer behind it.
    """
    start = max((at + len(word) for word in thinking_end if word and (at := response.rfind(word)) >= 0), default=0)
    unfinished = any(response.find(word, start) >= 0 for end in thinking_end for word in _thinking_start(end))
    return "" if unfinished else response[start:]


@lru_cache(maxsize=64)
def _thinking_start(end: str) -> tuple[str, ...]:
    """Return the word that begins the thinking that `end` ends: <think> for </think>; none where it is unknown."""
    word = end.replace("/", "", 1) if "/" in end else end.replace("end", "begin", 1)
    return (word,) if word != end else ()


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
    """Return the last box, and the list of boxes joined to it by commas or "and"; None without a box.

    A box that the words around it call wrong is no answer.
    """
    filled = [box for box in boxes(text) if not box_context.denied(text, box[1], box[2])]
    if not filled:
        return None
    joined = [filled[-1]]
    for box in reversed(filled[:-1]):
        between = text[box[2] : joined[0][1]]
        if not (_JOIN.fullmatch(between) and _JOIN_WORD.search(between)):
            break
        joined.insert(0, box)
    answers = [box_context.in_context(text, start, end, content) for content, start, end in joined]
    return ExtractedAnswer(answers[-1], " , ".join(answers) if len(answers) > 1 else None)


def _without_labels(text: str) -> str:
    """Return the text with bold labels and headings as plain words: **Final Answer**: 7 -> Final Answer: 7."""
    if "*" not in text and "__" not in text and "#" not in text:
        return text
    text = _LABEL_LINE.sub(r"\1: ", _LABEL_COLON.sub(r"\1: ", text))
    return _LABEL_ONLY.sub("\n", text)


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
    for _, start, end in reversed(boxes(text)):
        text = text[:start] + text[end:]  # boxes that the words around them call wrong
    text = _without_labels(text[-4000:])  # phrases stand at the end; the searches below stay short
    while (shorter := _FOLLOW_UP.sub("", text)) != text:
        text = shorter
    if tag := _TAG.search(text) or _HASHES.search(text):
        return ExtractedAnswer(tag.group(1))
    phrases = list(_PHRASE.finditer(text))
    if phrases and (clause := _clause(text[phrases[-1].end() :])):
        return ExtractedAnswer(_answer_of_clause(clause))
    if _NO_ANSWER.search(text):
        return None
    if bold := [words for words in _BOLD.findall(text) if not _LABEL_WORDS.match(words)]:
        return ExtractedAnswer(bold[-1])
    closing = _CLOSING.search(text.rstrip(" .*")[-200:])
    if closing and not re.search(r"\$|\\\)", closing.group()[len(closing.group(1)) :]):
        return ExtractedAnswer(closing.group(1))
    formula = _last_math(text)
    return None if formula is None else ExtractedAnswer(formula)
