"""Chains of digits, whose responses may have very different lengths: text of problems and responses, and verdicts.

    question  058,044,031,027
    response  018,001,

A step is a count of two digits, a digit and a comma. The count goes down to 00. The digit grows from the one before it
by 3 if the digit two steps back is at least 5, and by 1 if not, modulo 10: above, 7 + 1 = 8 because of the 1, then
8 + 3 = 1 because of the 7. The question has the first four steps; its last count tells how many the response has. Every
character is a token, and the chat template's token between question and response stands for the comma between their
steps: the distance of a step to those before it is always the same. The last digit is the answer.

Either digit alone tells something of the next. Of a sum of two digits it would not, and sums were learnt late.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

MODULUS = 10
GIVEN = 4  # digits that a question gives
LONGEST = 96  # steps of a response: the first count of the question is then 99
STEP_TOKENS = 4


def question(digits: Sequence[int], steps: int) -> str:
    """Return the text of a problem from its first digits."""
    return "".join(_step(steps + GIVEN - 1 - number, digit) for number, digit in enumerate(digits)).rstrip(",")


def answer(digits: Sequence[int], steps: int) -> str:
    """Return the gold answer of a problem."""
    return careless_response(digits, steps, 0.0, random.Random())[-2]


def careless_response(digits: Sequence[int], steps: int, error_rate: float, generator: random.Random) -> str:
    """Return a response whose digits err with a probability each. It continues from its errors; counts are right."""
    chain = list(digits)
    for _ in range(steps):
        error = generator.randrange(1, MODULUS) if generator.random() < error_rate else 0
        growth = 3 if chain[-2] >= MODULUS // 2 else 1
        chain.append((chain[-1] + growth + error) % MODULUS)
    return "".join(_step(steps - 1 - number, digit) for number, digit in enumerate(chain[GIVEN:]))


def is_correct(row: Mapping[str, Any], response: str) -> bool:
    """Return whether a response counts down to the gold answer, for `verify.function`."""
    return response.endswith(_step(0, int(row["gold_answer"])))


def _step(count: int, digit: int) -> str:
    return f"{count:02d}{digit},"
