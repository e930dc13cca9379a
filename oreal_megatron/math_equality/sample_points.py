"""Points at which two expressions with letters are compared, chosen where different expressions tend to differ.

Small fractions of both signs, integers, both sides of every number written in the expressions, and +-10^3 and +-10^6.
Beside floors, also the numbers at which floors jump.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from fractions import Fraction

from oreal_megatron.math_equality.tree import Node, walk

Point = Callable[[str], Fraction]
INTEGER_LETTERS = frozenset("nmkjNMK")  # taken for integers beside floors and powers of -1
_STEPS = ("floor", "ceil", "gcd", "lcm", "mod")
_ROOTS = frozenset(("sqrt", "root", "ln", "log", "lg"))
_BENT = _ROOTS | {"abs", "max", "min", "sgn"}  # equal on one side of a bend, or real on one side only
MORE_TRIALS = 16
MAX_CONSTANTS = 6
MAX_NODES = 24_000  # visited in one comparison: longer expressions are compared at fewer points
_JUMPS = sorted(
    set(range(1, 61))
    | {2**k + d for k in range(5, 14) for d in (-1, 0, 1)}
    | {k * k + d for k in range(8, 14) for d in (-1, 0, 1)}
    | {10**k + d for k in (2, 3, 4, 6) for d in (-1, 0, 1)}
)


def points(gold: Node, predicted: Node) -> list[Point]:
    """Return the points for two expressions, the most telling first; the same expressions have the same points."""
    nodes = [*walk(gold), *walk(predicted)]
    letters = sorted({part[1] for part in nodes if part[0] == "atom"})
    is_integer = _integer_letters(gold, nodes)
    chosen = [_hashed(trial, is_integer) for trial in range(10)]
    far = [Fraction(10**3), Fraction(10**6)]
    for constant in _constants(nodes) + far:
        for middle in (constant, -constant):
            for side in (1, -1):
                chosen += [_near(middle, side, letter, is_integer) for letter in letters[:3] or [""]]
    if any(part[0] == "fn" and part[1] in _BENT for part in nodes):
        chosen += [_spread(trial, is_integer) for trial in range(MORE_TRIALS)]
    if any(_is_step(part) for part in nodes):
        jumps = _JUMPS + [int(c) * k + d for c in _constants(nodes) if c > 60 for k in (1, 2, 3) for d in (-1, 0, 1)]
        chosen += [_jump(jumps, index, letters, is_integer) for index in range(len(jumps))]
    return chosen[: max(10, MAX_NODES // (4 * len(nodes)))]


def count_roots(node: Node) -> int:
    """Count roots and logarithms as written: the root of a product may be real where the product of roots is not."""
    return sum(part[0] == "fn" and part[1] in _ROOTS or part[0] == "pow" and part[2][0] == "div" for part in walk(node))


def _is_step(node: Node) -> bool:
    return node[0] == "fn" and node[1] in _STEPS


def _integer_letters(gold: Node, nodes: list[Node]) -> Callable[[str], bool]:
    """Return a test for letters that are integers: all beside a gold's gcd, INTEGER_LETTERS beside floors, (-1)^n."""
    if any(_is_step(part) and part[1] in ("gcd", "lcm") for part in walk(gold)):
        return lambda name: True
    signs = any(part[0] == "pow" and part[1][0] == "neg" and part[2][0] != "num" for part in nodes)
    letters = INTEGER_LETTERS if signs or any(map(_is_step, nodes)) else frozenset()
    return lambda name: name in letters


def _constants(nodes: list[Node]) -> list[Fraction]:
    """Return numbers written in the expressions, the largest first; those below 3 lie among the small points."""
    numbers = {abs(part[1]) for part in nodes if part[0] == "num" and 3 <= abs(part[1]) <= 10**9}
    return sorted(numbers, reverse=True)[:MAX_CONSTANTS]


def _hash(*parts: object) -> int:
    return zlib.crc32(" ".join(map(str, parts)).encode("utf-8", "replace"))


def _small(trial: int, name: str) -> Fraction:
    """Return a fraction of either sign; its denominator is a prime, so it is rarely a zero or edge of the answer."""
    hashed = _hash(trial, name)
    sign = -1 if trial % 3 == 2 or trial % 3 == 1 and hashed & 1024 else 1
    return sign * Fraction(373 + hashed % 3331, 1009)


def _hashed(trial: int, is_integer: Callable[[str], bool]) -> Point:
    """Return a point of small fractions for the first six trials, then of integers; each letter has its own value."""

    def value(name: str) -> Fraction:
        if trial >= 6 or is_integer(name):
            return Fraction(2 + _hash(trial, name) % 17 + 19 * (trial % 6))
        return _small(trial, name)

    return value


def _spread(trial: int, is_integer: Callable[[str], bool]) -> Point:
    """Return a point of fractions from near 0 to 4: positive ones in every other trial, else of either sign."""

    def value(name: str) -> Fraction:
        hashed = _hash("spread", trial, name)
        if is_integer(name):
            return Fraction(1 + hashed % 12)
        return (-1 if trial % 2 and hashed & 2048 else 1) * Fraction(3 + hashed % (4001 >> trial % 4), 1013)

    return value


def _near(middle: Fraction, side: int, letter: str, is_integer: Callable[[str], bool]) -> Point:
    """Return a point with one letter close to `middle` on one side of it, and the others small."""

    def value(name: str) -> Fraction:
        if letter and name != letter:
            hashed = _hash(middle, side, name)
            return Fraction(1 + hashed % 9) if is_integer(name) else _small(_hash(middle, side), name)
        if is_integer(name):
            return Fraction(abs(int(middle)) + side)
        return middle + side * Fraction(101 + _hash(middle, name) % 499, 1009)

    return value


def _jump(jumps: list[int], index: int, letters: list[str], is_integer: Callable[[str], bool]) -> Point:
    """Return a point with the first letter at one of the jumps and the others at any; real letters beside it."""

    def value(name: str) -> Fraction:
        first = letters[:1] == [name]
        number = Fraction(jumps[index if first else _hash(index, name) % len(jumps)])
        at_jump = is_integer(name) or index % 4 == 0
        return number if at_jump else number + Fraction(_hash(index, name) % 2017 - 1008, 2027)

    return value
