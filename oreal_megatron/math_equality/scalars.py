"""Are two expressions the same value? Exactly where both are fractions, else at two precisions and many points."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from oreal_megatron.math_equality import units
from oreal_megatron.math_equality.evaluator import Evaluator, has_variables
from oreal_megatron.math_equality.sample_points import Point, points, roots
from oreal_megatron.math_equality.shapes import Quantity, is_infinite
from oreal_megatron.math_equality.tree import Node, walk
from oreal_megatron.math_equality.values import Arithmetic, NotReal, RealArithmetic, TooLarge, Undefined, Value

QUICK, REAL_QUICK = Arithmetic(160), RealArithmetic(160)
SHORT = 128  # bits of the numbers in an answer up to which 600 bits tell its values apart
MAX_PRECISION = 16_384  # bits; answers that need more are equal only when they are written alike
ENOUGH = 3  # points where both sides have values and agree
MAX_WORK = 30_000  # nodes visited in one comparison of two answers: about a second at the worst


@lru_cache(maxsize=16)
def _precise(bits: int, real: bool) -> Arithmetic:
    return RealArithmetic(bits) if real else Arithmetic(bits)


def fine(extent: int, real: bool = False) -> Arithmetic | None:
    """Arithmetic that tells numbers of this extent apart: 10^-100 needs more digits than 1/3. None beyond bounds."""
    if extent <= SHORT:
        return _precise(600, real)
    bits = 1 << (600 + 4 * extent).bit_length()
    return _precise(bits, real) if bits <= MAX_PRECISION else None


class Scalars:
    """One comparison. `method` tells how the last values met: exact, numeric or symbolic."""

    def __init__(self) -> None:
        self.method = "exact"
        self.work_left = MAX_WORK

    def note(self, method: str) -> None:
        order = ("exact", "numeric", "symbolic")
        self.method = max(self.method, method, key=order.index)

    def quantities(self, gold: Quantity, predicted: Quantity) -> bool:
        """Numbers and expressions with their units and percent signs."""
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
        """Both sides in radians where one is written in degrees and the other with pi: 45 degrees is pi/4."""
        sides = []
        for one, other in ((gold, predicted), (predicted, gold)):
            if one.unit == "degree":
                sides.append(("div", ("mul", (one.node, ("const", "pi"))), ("num", Fraction(180), None)))
            elif other.unit == "degree" and one.unit in (None, "radian") and "pi" in _constants(one.node):
                sides.append(one.node)
        return (sides[0], sides[1]) if len(sides) == 2 and gold.unit != predicted.unit else None

    @staticmethod
    def numerals(gold: Node, predicted: Node) -> bool:
        """204_5 is 204_5 and, without its base, 204; another base is another answer, save that 54 may be written
        54_{10}."""
        if gold[0] == predicted[0]:
            return gold[1:] == predicted[1:]
        numeral, other = (gold, predicted) if gold[0] == "base" else (predicted, gold)
        written = numeral is gold or numeral[2] == 10
        return written and other[0] == "num" and numeral[1] == str(other[1])

    def scalars(self, gold: Node, predicted: Node) -> bool:
        """Two expressions: equal everywhere, or a decimal that is the other side as far as it is written."""
        if not has_variables(gold) and not has_variables(predicted):
            return self.numbers(gold, predicted)
        self.note("symbolic")
        return self.everywhere(gold, predicted, lambda arithmetic, g, p: arithmetic.same(g, p))

    def numbers(self, gold: Node, predicted: Node) -> bool:
        values, extent = self.at_point(gold, predicted, QUICK)
        if values is None:
            return False
        g, p = values
        if isinstance(g, Fraction) and isinstance(p, Fraction):
            return g == p or self.written(gold, g, predicted, p)
        self.note("numeric")
        if (same := QUICK.same(g, p)) is False:
            return self.written(gold, g, predicted, p)
        if same and QUICK.ball(g).residue is not None and QUICK.ball(p).residue is not None:
            return True
        arithmetic = fine(extent)
        sure = None if arithmetic is None else self.at_point(gold, predicted, arithmetic)[0]
        return sure is not None and arithmetic.equal(*sure)

    def written(self, gold: Node, g: Value, predicted: Node, p: Value) -> bool:
        """A gold written as a decimal of three or more digits stands for what rounds to it; so does a predicted decimal
        of at least 12 digits (a machine number) for a gold that is no whole number. 12.54 is no better known 12.5."""
        places, more = _places(gold), _places(predicted)
        if places and more and abs(more - places) < 2:
            return False
        for decimal, exact, least in ((gold, p, 3), (predicted, g, 12)):
            inner = decimal[1] if decimal[0] == "neg" else decimal
            if inner[0] != "num" or not inner[2] or len(str(int(inner[1] * 10 ** inner[2]))) < least:
                continue
            if isinstance(exact, Fraction) and exact.denominator == 1 or not QUICK.is_real(exact):
                continue
            value = inner[1] if decimal is inner else -inner[1]
            distance = QUICK.absolute(QUICK.add(exact, -value))
            half = Fraction(1, 2 * 10 ** inner[2])
            self.note("numeric")
            if QUICK.ball(distance).middle < QUICK.ball(half).middle:
                return True
        return False

    def value(self, node: Node, arithmetic: Arithmetic, at: Point) -> tuple[Value | type[NotReal] | None, int]:
        """(value, extent); NotReal where the reals have none; None at a pole, or when this comparison has no work
        left."""
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
        """(both values, extent), the values None where one side has none."""
        (g, extent), (p, other) = self.value(gold, arithmetic, at), self.value(predicted, arithmetic, at)
        missing = any(value is None or value is NotReal for value in (g, p))
        return None if missing else (g, p), max(extent, other)

    def everywhere(self, gold: Node, predicted: Node, agree: Callable[[Arithmetic, Value, Value], bool | None]) -> bool:
        """Whether the sides agree at every point where both have values, and there are enough such points. `agree` says
        None of a point that tells nothing. Real numbers only, unless the imaginary unit was written."""
        real = "i" not in _constants(gold) | _constants(predicted)
        quick, sure, agreed = REAL_QUICK if real else QUICK, None, 0
        for at in points(gold, predicted):
            (g, extent), (p, other) = self.value(gold, quick, at), self.value(predicted, quick, at)
            if self.work_left <= 0 or self.differ_in_domain((gold, g), (predicted, p)):
                return False
            if any(value is None or value is NotReal for value in (g, p)):
                continue
            if (verdict := agree(quick, g, p)) is False:
                return False
            if agreed < ENOUGH and not (isinstance(g, Fraction) and isinstance(p, Fraction)):
                sure = sure or fine(max(extent, other), real)
                values = None if sure is None else self.at_point(gold, predicted, sure, at)[0]
                verdict = None if values is None else agree(sure, *values)
            if verdict is False:
                return False
            agreed += bool(verdict)
        return agreed >= ENOUGH

    @staticmethod
    def differ_in_domain(*sides: tuple[Node, Value | type[NotReal] | None]) -> bool:
        """One side is real here and the other is not: sqrt(x) is not sqrt|x|. A product of roots may leave the reals
        where the root of the product does not."""
        lost = [node for node, value in sides if value is NotReal]
        kept = [node for node, value in sides if value is not None and value is not NotReal]
        return len(lost) == len(kept) == 1 and roots(lost[0]) <= roots(kept[0])


def _may_be_percent(node: Node) -> bool:
    """A gold whose percent sign may have been dropped: a whole number, or a decimal above one. Never both readings: 0.5
    is 50%, so it is not 0.5%."""
    inner = node[1] if node[0] == "neg" else node
    return inner[0] == "num" and (inner[1].denominator == 1 or inner[2] is not None and inner[1] > 1)


def _places(node: Node) -> int:
    """Digits written behind the point."""
    inner = node[1] if node[0] == "neg" else node
    return inner[2] or 0 if inner[0] == "num" else 0


def _hundredth(node: Node) -> Node:
    return ("div", node, ("num", Fraction(100), None))


def _constants(node: Node) -> set[str]:
    return {part[1] for part in walk(node) if part[0] == "const"}
