"""Running sums modulo 10 with a written check after each step: text of problems and responses, and their wrong steps.

    question  7+2+9+1+5+3+8+4=
    response  7v9v8v9v4v7v5v9v\\boxed{9}

After each running sum the response writes `v` if the step is right and `x` if it is wrong. A step is right if it adds
the next term to the number written before it: a chain that continues consistently from a wrong number has one.
Every character is a token, so positions in the text are positions of tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

MODULUS = 10
TERMS = 8
RIGHT, WRONG = "v", "x"
_STEP = re.compile(f"([0-9])([{RIGHT}{WRONG}])")


@dataclass(frozen=True)
class Step:
    """One running sum of a response with its check."""

    position: int  # of the digit within the response; the check follows it
    is_right: bool
    check: str


def question(terms: Sequence[int]) -> str:
    """Return the text of a problem."""
    return "+".join(map(str, terms)) + "="


def answer(terms: Sequence[int]) -> str:
    """Return the gold answer of a problem."""
    return str(sum(terms) % MODULUS)


def careless_response(terms: Sequence[int], error_rate: float, generator: random.Random) -> str:
    """Return a response whose steps err with a probability each. It continues from its errors; checks are right."""
    text, total = "", 0
    for term in terms:
        error = generator.randrange(1, MODULUS) if generator.random() < error_rate else 0
        total = (total + term + error) % MODULUS
        text += f"{total}{WRONG if error else RIGHT}"
    return f"{text}\\boxed{{{total}}}"


def read_steps(question_text: str, response: str) -> list[Step]:
    """Return the steps of a response up to the first character that is no step, at most one per term."""
    steps: list[Step] = []
    total, position = 0, 0
    for term in question_text.rstrip("=").split("+"):
        match = _STEP.match(response, position)
        if not match:
            break
        written = int(match[1])
        steps.append(Step(position, written == (total + int(term)) % MODULUS, match[2]))
        total, position = written, match.end()
    return steps


def first_wrong_step(question_text: str, response: str) -> int | None:
    """Return the position of the first wrong step's digit in a response; None if every step that it has is right."""
    return next((step.position for step in read_steps(question_text, response) if not step.is_right), None)
