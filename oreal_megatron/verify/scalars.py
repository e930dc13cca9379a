"""Are two expressions the same value? Exactly where both are fractions, else at two precisions and many points."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from oreal_megatron.verify import units
from oreal_megatron.verify.evaluate import Evaluator, Point, has_steps, has_variables, point
from oreal_megatron.verify.shapes import Quantity, is_infinite
from oreal_megatron.verify.tree import Node, walk
from oreal_megatron.verify.values import Arithmetic, RealArithmetic, TooLarge, Undefined, Value

QUICK, SURE = Arithmetic(160), Arithmetic(600)
REAL_QUICK, REAL_SURE = RealArithmetic(160), RealArithmetic(600)
TRIALS = 24
ENOUGH, PLENTY = 3, 6  # points where both sides have values and agree: needed, and after which no more are tried
MAX_WORK = 30_000  # nodes visited in one comparison of two answers: about a second at the worst


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
        if scale is None:
            return False
        node = predicted.node if scale == 1 else ("mul", (("num", scale, None), predicted.node))
        if self.scalars(gold.node, node):
            return True
        hundredth = ("div", node, ("num", Fraction(100), None))
        if gold.percent and not predicted.percent:
            return self.scalars(("div", gold.node, ("num", Fraction(100), None)), node)
        if predicted.percent and not gold.percent and not _is_whole(gold.node):
            return self.scalars(gold.node, hundredth)
        return False

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
        return self.everywhere(gold, predicted, lambda arithmetic, g, p: arithmetic.equal(g, p))

    def numbers(self, gold: Node, predicted: Node) -> bool:
        values = self.at_point(gold, predicted, QUICK, point(0, False))
        if values is None:
            return False
        g, p = values
        if isinstance(g, Fraction) and isinstance(p, Fraction):
            return g == p or self.written(gold, g, predicted, p)
        self.note("numeric")
        if not QUICK.equal(g, p):
            return self.written(gold, g, predicted, p)
        sure = self.at_point(gold, predicted, SURE, point(0, False))
        return sure is not None and SURE.equal(*sure)

    def written(self, gold: Node, g: Value, predicted: Node, p: Value) -> bool:
        """A gold written as a decimal of three or more digits stands for what rounds to it; so does a predicted decimal
        of at least 12 digits (a machine number) for a gold that is no whole number."""
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

    def at_point(self, gold: Node, predicted: Node, arithmetic: Arithmetic, at: Point) -> tuple[Value, Value] | None:
        """Both values, or None where one has none, or the work of this comparison is used up."""
        evaluator = Evaluator(arithmetic, at, self.work_left)
        try:
            return evaluator.value(gold), evaluator.value(predicted)
        except (Undefined, TooLarge):
            return None
        finally:
            self.work_left -= evaluator.work

    def everywhere(self, gold: Node, predicted: Node, agree: Callable[[Arithmetic, Value, Value], bool | None]) -> bool:
        """Whether the sides agree at every point where both have values, and there are enough such points. `agree` says
        None of a point that tells nothing.

        Points where a side leaves the real numbers are skipped, unless the imaginary unit was written."""
        whole = has_steps(gold) or has_steps(predicted)
        written_i = "i" in _constants(gold) | _constants(predicted)
        quick, sure = (QUICK, SURE) if written_i else (REAL_QUICK, REAL_SURE)
        agreed = 0
        for trial in range(TRIALS):
            values = self.at_point(gold, predicted, quick, point(trial, whole))
            if values is None or not written_i and not all(quick.is_real(value) for value in values):
                continue
            verdict = agree(quick, *values)
            if verdict is None:
                continue
            if not verdict:
                return False
            if agreed < ENOUGH and not all(isinstance(value, Fraction) for value in values):
                values = self.at_point(gold, predicted, sure, point(trial, whole))
                if values is None or not agree(sure, *values):
                    return False
            agreed += 1
            if agreed == PLENTY:
                return True
        return agreed >= ENOUGH


def _is_whole(node: Node) -> bool:
    inner = node[1] if node[0] == "neg" else node
    return inner[0] == "num" and inner[1].denominator == 1


def _constants(node: Node) -> set[str]:
    return {part[1] for part in walk(node) if part[0] == "const"}
