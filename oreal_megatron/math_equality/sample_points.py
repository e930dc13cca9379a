"""The points where two expressions with letters are compared: where they may part, not only where it is comfortable.

Small fractions of both signs, whole numbers, both sides of every number written in the expressions, and far out. Where
floors are written, also the numbers at which floors jump.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from fractions import Fraction

from oreal_megatron.math_equality.tree import Node, walk

Point = Callable[[str], Fraction]
WHOLE_LETTERS = frozenset("nmkjNMK")  # taken for whole numbers beside floors and powers of -1
_STEPS = ("floor", "ceil", "gcd", "lcm")
_ROOTS = frozenset(("sqrt", "root", "ln", "log", "lg"))
MAX_CONSTANTS = 6
MAX_NODES = 24_000  # visited in one comparison: long expressions are compared at fewer points
_JUMPS = sorted(
    set(range(1, 61))
    | {2**k + d for k in range(5, 14) for d in (-1, 0, 1)}
    | {k * k + d for k in range(8, 14) for d in (-1, 0, 1)}
    | {10**k + d for k in (2, 3, 4, 6) for d in (-1, 0, 1)}
)


def points(gold: Node, predicted: Node) -> list[Point]:
    """Points in the order of what they tell; the same for the same two expressions."""
    nodes = [*walk(gold), *walk(predicted)]
    letters = sorted({part[1] for part in nodes if part[0] == "atom"})
    whole = _whole_letters(gold, nodes)
    found = [_hashed(trial, whole) for trial in range(10)]
    far = [Fraction(10**3), Fraction(10**6)]
    for constant in _constants(nodes) + far:
        for middle in (constant, -constant):
            for side in (1, -1):
                found += [_near(middle, side, letter, whole) for letter in letters[:3] or [""]]
    if any(_is_step(part) for part in nodes):
        jumps = _JUMPS + [int(c) * k + d for c in _constants(nodes) if c > 60 for k in (1, 2, 3) for d in (-1, 0, 1)]
        found += [_jump(jumps, index, letters, whole) for index in range(len(jumps))]
    return found[: max(10, MAX_NODES // (4 * len(nodes)))]


def roots(node: Node) -> int:
    """Roots and logarithms written: the root of a product may be real where the product of roots is not."""
    return sum(part[0] == "fn" and part[1] in _ROOTS or part[0] == "pow" and part[2][0] == "div" for part in walk(node))


def _is_step(node: Node) -> bool:
    return node[0] == "fn" and node[1] in _STEPS


def _whole_letters(gold: Node, nodes: list[Node]) -> Callable[[str], bool]:
    """Which letters stand for whole numbers: all beside a gold's gcd, n and its like beside floors and (-1)^n."""
    if any(_is_step(part) and part[1] in ("gcd", "lcm") for part in walk(gold)):
        return lambda name: True
    signs = any(part[0] == "pow" and part[1][0] == "neg" and part[2][0] != "num" for part in nodes)
    letters = WHOLE_LETTERS if signs or any(map(_is_step, nodes)) else frozenset()
    return lambda name: name in letters


def _constants(nodes: list[Node]) -> list[Fraction]:
    """Numbers written in the expressions, the largest first; those below 3 lie among the small points."""
    numbers = {abs(part[1]) for part in nodes if part[0] == "num" and 3 <= abs(part[1]) <= 10**9}
    return sorted(numbers, reverse=True)[:MAX_CONSTANTS]


def _hash(*parts: object) -> int:
    return zlib.crc32(" ".join(map(str, parts)).encode("utf-8", "replace"))


def _small(trial: int, name: str) -> Fraction:
    """A fraction of either sign; its denominator is a prime: hardly ever a zero or an edge of the answer."""
    hashed = _hash(trial, name)
    sign = -1 if trial % 3 == 2 or trial % 3 == 1 and hashed & 1024 else 1
    return sign * Fraction(373 + hashed % 3331, 1009)


def _hashed(trial: int, whole: Callable[[str], bool]) -> Point:
    """Six points of small fractions, then whole numbers; each letter has a value of its own."""

    def value(name: str) -> Fraction:
        if trial >= 6 or whole(name):
            return Fraction(2 + _hash(trial, name) % 17 + 19 * (trial % 6))
        return _small(trial, name)

    return value


def _near(middle: Fraction, side: int, letter: str, whole: Callable[[str], bool]) -> Point:
    """One letter close to `middle` on one side of it, the others small."""

    def value(name: str) -> Fraction:
        if letter and name != letter:
            return Fraction(1 + _hash(middle, side, name) % 9) if whole(name) else _small(_hash(middle, side), name)
        if whole(name):
            return Fraction(abs(int(middle)) + side)
        return middle + side * Fraction(101 + _hash(middle, name) % 499, 1009)

    return value


def _jump(jumps: list[int], index: int, letters: list[str], whole: Callable[[str], bool]) -> Point:
    """The first letter runs through the jumps, the others take one of them; real letters stand off it."""

    def value(name: str) -> Fraction:
        first = letters[:1] == [name]
        number = Fraction(jumps[index if first else _hash(index, name) % len(jumps)])
        return number if whole(name) or index % 4 == 0 else number + Fraction(_hash(index, name) % 2017 - 1008, 2027)

    return value
