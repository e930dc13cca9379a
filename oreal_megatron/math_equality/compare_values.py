"""Comparison of two expressions: exact where both are fractions, else at two precisions and many points."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import TypeAlias

from oreal_megatron.math_equality import units
from oreal_megatron.math_equality.evaluator import Evaluator, has_variables
from oreal_megatron.math_equality.sample_points import Point, count_roots, points
from oreal_megatron.math_equality.shapes import Quantity, is_infinite
from oreal_megatron.math_equality.tree import Node, walk
from oreal_megatron.math_equality.values import (
    Arithmetic,
    MpmathNumber,
    NotReal,
    RealArithmetic,
    TooLarge,
    Undefined,
    Value,
)

QUICK, REAL_QUICK = Arithmetic(160), RealArithmetic(160)
SHORT = 128  # bits of the numbers in an answer up to which 600 bits are enough
MAX_PRECISION = 16_384  # bits; answers that need more are equal only when they are written alike
ENOUGH = 3  # points where both sides have values and agree
MAX_WORK = 30_000  # nodes visited in one comparison of two answers: at most about a second
MaybeValue: TypeAlias = Value | type[NotReal] | None  # NotReal: no real value; None: a pole, or no work left


@lru_cache(maxsize=16)
def _precise(bits: int, real: bool) -> Arithmetic:
    return RealArithmetic(bits) if real else Arithmetic(bits)


def precise_arithmetic(extent: int, real: bool = False) -> Arithmetic | None:
    """Return arithmetic precise enough for numbers of this extent; None where that is beyond MAX_PRECISION.

    10^-100 needs more digits than 1/3.
    """
    if extent <= SHORT:
        return _precise(600, real)
    bits = 1 << (600 + 4 * extent).bit_length()
    return _precise(bits, real) if bits <= MAX_PRECISION else None


class ValueComparison:
    """One comparison of two answers, as far as they are single values.

    `method` is how the last two values were compared: exact, numeric or symbolic.
    """

    def __init__(self, work: int = MAX_WORK) -> None:
        self.method = "exact"
        self.work_left = work

    def note(self, method: str) -> None:
        """Record a method; the least exact of a comparison is its method."""
        order = ("exact", "numeric", "symbolic")
        self.method = max(self.method, method, key=order.index)

    def quantities(self, gold: Quantity, predicted: Quantity) -> bool:
        """Compare numbers and expressions with their units and percent signs."""
        if gold.node[0] == "base" or predicted.node[0] == "base":
            return self.numerals(gold.node, predicted.node)
        if is_infinite(gold.node) or is_infinite(predicted.node):
            return is_infinite(gold.node) == is_infinite(predicted.node)
        if (radians := self.radians(gold, predicted)) is not None:
            return self.scalars(*radians)
        scale = units.factor(gold.unit, predicted.unit)
        if scale is None or gold.percent and predicted.unit or predicted.percent and gold.unit:
            return False
        node = predicted.node if scale == 1 else ("mul", (("num", scale, None), predicted.node))
        if predicted.percent and not gold.percent and not _may_be_percent(gold.node):
            return self.scalars(gold.node, _hundredth(node))
        if self.scalars(gold.node, node):
            return True
        return gold.percent and not predicted.percent and self.scalars(_hundredth(gold.node), node)

    @staticmethod
    def radians(gold: Quantity, predicted: Quantity) -> tuple[Node, Node] | None:
        """Return both sides in radians where one is in degrees and the other holds pi: 45 degrees is pi/4."""
        sides: list[Node] = []
        for side, other in ((gold, predicted), (predicted, gold)):
            if side.unit == "degree":
                sides.append(("div", ("mul", (side.node, ("const", "pi"))), ("num", Fraction(180), None)))
            elif other.unit == "degree" and side.unit in (None, "radian") and "pi" in _constants(side.node):
                sides.append(side.node)
        return (sides[0], sides[1]) if len(sides) == 2 and gold.unit != predicted.unit else None

    @staticmethod
    def numerals(gold: Node, predicted: Node) -> bool:
        """Compare numerals with a base as written: 204_5 is 204_5 or 204 without its base; 54 may be 54_{10}."""
        if gold[0] == predicted[0]:
            return gold[1:] == predicted[1:]
        numeral, other = (gold, predicted) if gold[0] == "base" else (predicted, gold)
        may_drop_base = numeral is gold or numeral[2] == 10
        return bool(may_drop_base and other[0] == "num" and numeral[1] == str(other[1]))

    def scalars(self, gold: Node, predicted: Node) -> bool:
        """Compare two expressions: equal everywhere, or one is a decimal to which the other rounds."""
        if not has_variables(gold) and not has_variables(predicted):
            return self.numbers(gold, predicted)
        self.note("symbolic")
        return self.everywhere(gold, predicted, lambda arithmetic, g, p: arithmetic.same(g, p))

    def numbers(self, gold: Node, predicted: Node) -> bool:
        """Compare two expressions without letters, first at 160 bits, then at as many as they need."""
        values, extent = self.at_point(gold, predicted, QUICK)
        if values is None:
            return False
        g, p = values
        if isinstance(g, Fraction) and isinstance(p, Fraction):
            return g == p or self.rounded(gold, g, predicted, p)
        self.note("numeric")
        if (same := QUICK.same(g, p)) is False:
            return self.rounded(gold, g, predicted, p)
        if same and QUICK.ball(g).residue is not None and QUICK.ball(p).residue is not None:
            return True
        arithmetic = precise_arithmetic(extent)
        if arithmetic is None:
            return False
        precise_values, _ = self.at_point(gold, predicted, arithmetic)
        return precise_values is not None and arithmetic.equal(*precise_values)

    def rounded(self, gold: Node, g: Value, predicted: Node, p: Value) -> bool:
        """Return whether one side is a decimal to which the other side rounds.

        A gold decimal needs three digits, a predicted one twelve (a machine number) and a gold that is no integer.
        Two decimals of nearly the same length are different numbers: 12.54 is no more precise 12.5.
        """
        places, more = _places(gold), _places(predicted)
        if places and more and abs(more - places) < 2:
            return False
        for decimal, exact, least_digits in ((gold, p, 3), (predicted, g, 12)):
            inner = decimal[1] if decimal[0] == "neg" else decimal
            if inner[0] != "num" or not inner[2] or len(str(int(inner[1] * 10 ** inner[2]))) < least_digits:
                continue
            if isinstance(exact, Fraction) and exact.denominator == 1 or not QUICK.is_real(exact):
                continue
            value = inner[1] if decimal is inner else -inner[1]
            self.note("numeric")
            if _distance(exact, value) < QUICK.ball(Fraction(1, 2 * 10 ** inner[2])).middle:
                return True
            if decimal is predicted and _is_double(value, inner[2], exact):
                return True
        return False

    def is_near(self, exact: Node, approximation: Node, half: Fraction | None) -> bool:
        """Return whether two values differ by at most `half`, or by a hundredth of the value where there is none."""
        values, _ = self.at_point(exact, approximation, QUICK)
        if (
            values is None
            or not QUICK.is_real(values[0])
            or not isinstance(values[1], Fraction)
            and not QUICK.is_real(values[1])
        ):
            return False
        distance = QUICK.absolute(QUICK.add(values[0], QUICK.negative(values[1])))
        limit = QUICK.ball(half).middle if half is not None else abs(QUICK.ball(values[0]).middle) / 100
        return bool(QUICK.ball(distance).middle <= limit)

    def value(self, node: Node, arithmetic: Arithmetic, at: Point) -> tuple[MaybeValue, int]:
        """Return (value, extent) of an expression at a point."""
        evaluator = Evaluator(arithmetic, at, self.work_left)
        try:
            value = evaluator.value(node)
            real = not isinstance(arithmetic, RealArithmetic) or arithmetic.is_real(value)
            return value if real else NotReal, evaluator.extent
        except NotReal:
            return NotReal, 0
        except (Undefined, TooLarge):
            return None, 0
        finally:
            self.work_left -= evaluator.work

    def at_point(
        self, gold: Node, predicted: Node, arithmetic: Arithmetic, at: Point = lambda name: Fraction(1)
    ) -> tuple[tuple[Value, Value] | None, int]:
        """Return (both values, extent); the values are None where one side has none."""
        (g, extent), (p, other) = self.value(gold, arithmetic, at), self.value(predicted, arithmetic, at)
        values = (g, p) if isinstance(g, Value) and isinstance(p, Value) else None
        return values, max(extent, other)

    def everywhere(self, gold: Node, predicted: Node, agree: Callable[[Arithmetic, Value, Value], bool | None]) -> bool:
        """Return whether the sides agree at every point where both have values, at ENOUGH points or more.

        `agree` returns None for a point that decides nothing. Letters are real unless the imaginary unit is written.
        """
        real = "i" not in _constants(gold) | _constants(predicted)
        quick, agreed = REAL_QUICK if real else QUICK, 0
        precise: Arithmetic | None = None
        for at in points(gold, predicted):
            (g, extent), (p, other) = self.value(gold, quick, at), self.value(predicted, quick, at)
            if self.work_left <= 0 or self.differ_in_domain((gold, g), (predicted, p)):
                return False
            if not isinstance(g, Value) or not isinstance(p, Value):
                continue
            if (verdict := agree(quick, g, p)) is False:
                return False
            if agreed < ENOUGH and not (isinstance(g, Fraction) and isinstance(p, Fraction)):
                precise = precise or precise_arithmetic(max(extent, other), real)
                values = None if precise is None else self.at_point(gold, predicted, precise, at)[0]
                verdict = None if precise is None or values is None else agree(precise, *values)
            if verdict is False:
                return False
            agreed += bool(verdict)
        return agreed >= ENOUGH

    @staticmethod
    def differ_in_domain(*sides: tuple[Node, MaybeValue]) -> bool:
        """Return whether one side is real here and the other is not: sqrt(x) is not sqrt|x|.

        A side with more roots may leave the reals: sqrt(x) sqrt(y) is sqrt(xy) only where x and y are not negative.
        """
        not_real = [node for node, value in sides if value is NotReal]
        real = [node for node, value in sides if isinstance(value, Value)]
        return len(not_real) == len(real) == 1 and count_roots(not_real[0]) <= count_roots(real[0])


def _may_be_percent(node: Node) -> bool:
    """Return whether a gold may have dropped its percent sign: an integer, or a decimal above one.

    No gold has both readings: 0.5 is 50%, so it is not 0.5%.
    """
    inner = node[1] if node[0] == "neg" else node
    return bool(inner[0] == "num" and (inner[1].denominator == 1 or inner[2] is not None and inner[1] > 1))


def _distance(exact: Value, value: Fraction) -> MpmathNumber:
    return QUICK.ball(QUICK.absolute(QUICK.add(exact, -value))).middle


def _is_double(value: Fraction, places: int, exact: Value) -> bool:
    """Return whether a decimal of 16 digits or more is how a program prints the double nearest to `exact`."""
    digits = len(str(abs(int(value * 10**places))))
    try:
        double = float(exact if isinstance(exact, Fraction) else QUICK.context.re(exact.middle))
    except OverflowError:
        return False
    if digits < 16 or not math.isfinite(double) or isinstance(exact, Fraction) and exact.denominator == 1:
        return False
    if digits <= 17:
        return value in (Fraction(repr(double)), Fraction(f"{double:.{digits}g}"))
    return abs(Fraction(double) - value) <= Fraction(1, 2 * 10**places)  # all digits of the double


def _places(node: Node) -> int:
    """Return the number of digits written behind the decimal point."""
    inner = node[1] if node[0] == "neg" else node
    return int(inner[2] or 0) if inner[0] == "num" else 0


def _hundredth(node: Node) -> Node:
    return ("div", node, ("num", Fraction(100), None))


def _constants(node: Node) -> set[str]:
    return {part[1] for part in walk(node) if part[0] == "const"}
