"""Mathematics in the texts of a step: LaTeX formulas, and their MathML as trees that the page draws.

latex2mathml (optional) translates. Its output is not trusted: only elements and attributes that this file lists pass,
and a formula that it cannot translate stays text. A text refers to formulas by their numbers, in the order of the text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any
from xml.etree.ElementTree import Element

log = logging.getLogger(__name__)
Tree = list[object]  # name of the element, attributes if there are any, then texts and trees
Translate = Callable[[str, str], Tree | None]  # of LaTeX, "inline" or "block"

LONGEST_FORMULA, LONGEST_BOX = 1000, 200  # characters; translation takes 15 us for each
MOST_CHARACTERS = 50_000  # of the distinct formulas of a step
DEEPEST = 40
# Element -> number of children; None: any.
ELEMENTS = {
    "math": None, "mrow": None, "mi": 0, "mn": 0, "mo": 0, "mtext": 0, "mspace": 0, "mstyle": None, "mpadded": None,
    "mphantom": None, "msqrt": None, "menclose": None, "mfrac": 2, "mroot": 2, "msub": 2, "msup": 2, "munder": 2,
    "mover": 2, "msubsup": 3, "munderover": 3, "mtable": None, "mtr": None, "mtd": None,
}  # fmt: skip
ATTRIBUTES = frozenset(
    "display displaystyle scriptlevel mathvariant stretchy fence form accent accentunder separator movablelimits "
    "largeop linethickness width minsize maxsize columnalign columnspacing rowspacing notation".split()
)
VALUE = re.compile(r"[a-z-]+|(?:-0?\.\d+|\d(?:\.\d+)?)(?:em|ex|pt)?")  # lengths below 10
OPENING = re.compile(r"\\\(|\\\[|\$\$|\$(?=[^\s$])|\\begin\{(?:align|equation|gather)\*?\}|\\boxed\{|\\")
CLOSING = {r"\(": r"\)", r"\[": r"\]", "$$": "$$", "$": "$"}
MACROS = re.compile(r"\\(?:def|(?:re)?newcommand)")  # expansions may grow without bound
CHARACTER = re.compile(r"&#x([0-9A-F]{1,5});")  # in texts of latex2mathml
LATEX = re.compile(r"[\\^_]")


def add_formulas(prompts: Sequence[dict[str, Any]], translate: Translate) -> list[tuple[str, Tree]]:
    """Add "formulas" to the prompts and rollouts of a step; return the formulas to which the numbers refer.

    Questions and answers come first, then responses, those that were trained on before others, up to the limit.
    """
    formulas = StepFormulas(translate)
    rollouts = [rollout for prompt in prompts for rollout in prompt["rollouts"]]
    for prompt in prompts:
        _add(prompt, question=formulas.in_text(prompt["question"]), gold=formulas.in_answer(prompt["gold"]))
    for rollout in rollouts:
        _add(rollout, extracted=formulas.in_answer(rollout["extracted"]))
    for rollout in sorted(rollouts, key=lambda rollout: "chosen" not in rollout):
        _add(rollout, response=formulas.in_text(rollout["response"]))
    return formulas.entries


def _add(record: dict[str, Any], **numbers: list[int]) -> None:
    for field in filter(numbers.get, numbers):
        record.setdefault("formulas", {})[field] = numbers[field]


class StepFormulas:
    """Distinct formulas of a step, with their delimiters."""

    def __init__(self, translate: Translate):
        self.translate = translate
        self.entries: list[tuple[str, Tree]] = []
        self.numbers: dict[str, int | None] = {}
        self.characters = 0

    def in_text(self, text: str) -> list[int]:
        """Return the numbers of the formulas of a text."""
        if self.characters >= MOST_CHARACTERS:
            return []
        numbers = [self._number(source, latex) for source, latex in find_formulas(text)]
        return [number for number in numbers if number is not None]

    def in_answer(self, answer: object) -> list[int]:
        """Return the numbers of the formulas of an answer, which may be one without delimiters."""
        if not isinstance(answer, str) or not LATEX.search(answer):
            return []
        if numbers := self.in_text(answer):
            return numbers
        number = self._number(answer, answer)
        return [] if number is None else [number]

    def _number(self, source: str, latex: str) -> int | None:
        if source not in self.numbers:
            self.characters += len(source)
            style = "block" if source.startswith(("$$", r"\[", r"\begin")) else "inline"
            tree = self.translate(latex, style) if self.characters <= MOST_CHARACTERS else None
            self.numbers[source] = len(self.entries) if tree else None
            if tree:
                self.entries.append((source, tree))
        return self.numbers[source]


def find_formulas(text: str) -> Iterator[tuple[str, str]]:
    r"""Yield each formula with its delimiters, and its LaTeX: $x$, $$x$$, \(x\), \[x\], \boxed{x}, \begin{align}.

    A dollar sign behind a space or before a digit ends no formula: amounts of money are none.
    """
    start = 0
    while opening := OPENING.search(text, start):
        start, mark = opening.end(), opening.group()
        if mark == "\\":  # with the character that it escapes
            start += 1
            continue
        window = text[opening.start() : opening.start() + LONGEST_FORMULA]
        if stop := _end_of_box(window) if mark == r"\boxed{" else _end_of_formula(window, mark):
            closing = CLOSING.get(mark)
            yield window[:stop], window[len(mark) : stop - len(closing)] if closing else window[:stop]
            start = opening.start() + stop


def _end_of_formula(window: str, mark: str) -> int:
    """Return where the formula at the start of the window ends; 0 if it does not."""
    closing = CLOSING.get(mark) or mark.replace("begin", "end")
    stop = window.find(closing, len(mark))
    if mark == "$":
        while stop > 0 and window[stop - 1] == "\\":
            stop = window.find(closing, stop + 1)
        if stop > 0 and (window[stop - 1].isspace() or window[stop + 1 : stop + 2].isdigit()):
            return 0
    return stop + len(closing) if window[len(mark) : max(stop, 0)].strip() and "\n\n" not in window[:stop] else 0


def _end_of_box(window: str) -> int:
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", window[:LONGEST_BOX], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0 and brace.group() == "}":
            return brace.end()
    return 0


def translator() -> Translate | None:
    """Return the function from LaTeX to a tree, with a memory; None, with a warning, without latex2mathml."""
    try:
        from latex2mathml.converter import convert_to_element
    except ImportError:
        log.warning("mathematics of the rollouts stays LaTeX; to render it: pip install latex2mathml")
        return None

    @cache
    def translate(latex: str, style: str) -> Tree | None:
        if len(latex) > LONGEST_FORMULA or MACROS.search(latex):
            return None
        try:
            return checked_tree(convert_to_element(latex, display=style))
        except Exception:  # the library raises anything for LaTeX that it does not know
            return None

    return translate


def checked_tree(element: Element, depth: int = 0) -> Tree | None:
    """Return an element as a tree; None if an element, its number of children or a command in it is not known."""
    children = [checked_tree(child, depth + 1) for child in element]
    expected = ELEMENTS.get(element.tag, -1)
    if depth > DEEPEST or None in children or (expected is not None and len(children) != expected):
        return None
    text = CHARACTER.sub(lambda match: chr(int(match[1], 16)), element.text or "")
    if text.startswith("\\") and len(text) > 1:  # a command that latex2mathml passes through
        return None
    known = {name: value for name, value in element.attrib.items() if name in ATTRIBUTES and _is_plain(value)}
    return [element.tag, *([known] if known else []), *([text] if text else []), *children]


def _is_plain(value: str) -> bool:
    return all(VALUE.fullmatch(word) for word in value.split(" "))
