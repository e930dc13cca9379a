"""Are two trees the same answer? Values first (exact, then numeric), then lists, tuples, sets, intervals, relations."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from oreal_megatron.verify import intervals, units
from oreal_megatron.verify.evaluate import Evaluator, Point, has_steps, has_variables, point
from oreal_megatron.verify.shapes import (
    Quantity,
    assignments,
    is_infinite,
    items_of,
    lettered,
    matrix_rows,
    plus_minus,
    quantity,
    unnamed,
)  # fmt: skip
from oreal_megatron.verify.tree import Node, key, walk
from oreal_megatron.verify.values import Arithmetic, TooLarge, Undefined, Value

QUICK, SURE = Arithmetic(160), Arithmetic(600)
TRIALS = 9
ENOUGH = 3  # points where both sides have values and agree
MAX_WORK = 30_000  # nodes visited in one comparison of two answers: about a second at the worst
MAX_ITEMS = 60  # of a list compared in any order
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


class Same:
    """One comparison. `method` tells how the last values met: exact, numeric or symbolic."""

    def __init__(self) -> None:
        self.method = "exact"
        self.work_left = MAX_WORK

    def note(self, method: str) -> None:
        order = ("exact", "numeric", "symbolic")
        self.method = max(self.method, method, key=order.index)

    # -- answers -------------------------------------------------------------------------------------------------
    def answers(self, gold: Node, predicted: Node) -> bool:
        """Whether `predicted` is the answer `gold`."""
        gold, predicted = plus_minus(gold), plus_minus(predicted)
        if key(gold) == key(predicted):
            self.note("exact" if gold[0] == "num" else "symbolic")
            return True
        if gold[0] == "rel" and predicted[0] == "rel" and self.relations(gold, predicted):
            return True
        (gold_name, gold), (name, predicted) = unnamed(gold), unnamed(predicted)
        if gold_name and name and gold_name != name and min(len(gold_name), len(name)) == 1:
            return False  # x = 5 is not y = 5
        gold, predicted = plus_minus(gold), plus_minus(predicted)
        return self.unnamed_answers(gold, predicted)

    def unnamed_answers(self, gold: Node, predicted: Node) -> bool:
        kinds = {gold[0], predicted[0]}
        if kinds & {"list", "set"} and not kinds & {"union", "such", "minus"}:
            return self.collections(gold, predicted)
        if kinds == {"tuple"}:
            return gold[1:3] == predicted[1:3] and self.in_order(gold[3], predicted[3])
        if kinds & {"tuple", "union", "such", "minus", "rel", "meet"} or ("const", "set R") in (gold, predicted):
            return self.interval_sets(gold, predicted)
        if kinds & {"word"}:
            return False
        if (rows := matrix_rows(gold)) is not None:
            return self.matrices(rows, matrix_rows(predicted))
        if kinds & {"ratio"}:
            return self.ratios(gold, predicted)
        gold, predicted = quantity(gold), quantity(predicted)
        return self.quantities(lettered(gold, predicted), lettered(predicted, gold))

    # -- numbers -------------------------------------------------------------------------------------------------
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
            if QUICK.ball(distance).middle <= QUICK.ball(half).middle:
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

        Points where exactly one side or both leave the real line are skipped unless the imaginary unit was written."""
        whole = has_steps(gold) or has_steps(predicted)
        written_i = any("i" == part for node in (gold, predicted) for part in _constants(node))
        agreed = 0
        for trial in range(TRIALS):
            values = self.at_point(gold, predicted, QUICK, point(trial, whole))
            if values is None or not written_i and not all(QUICK.is_real(value) for value in values):
                continue
            verdict = agree(QUICK, *values)
            if verdict is None:
                continue
            if not verdict:
                return False
            if agreed < ENOUGH and not all(isinstance(value, Fraction) for value in values):
                values = self.at_point(gold, predicted, SURE, point(trial, whole))
                if values is None or not agree(SURE, *values):
                    return False
            agreed += 1
        return agreed >= ENOUGH

    def ratios(self, gold: Node, predicted: Node) -> bool:
        """2:3 is 4:6 and 2/3; a zero in it makes it a time of day, compared as written."""
        if gold[0] != predicted[0]:
            return self.scalars(gold, predicted)
        g, p = gold[1], predicted[1]
        if len(g) != len(p):
            return False
        if self.in_order(g, p):
            return True
        zero = ("num", Fraction(0), None)
        if any(self.scalars(zero, item) for item in g + p):
            return False
        return all(self.scalars(("mul", (g[0], b)), ("mul", (p[0], a))) for a, b in zip(g[1:], p[1:], strict=True))

    # -- several answers -----------------------------------------------------------------------------------------
    def in_order(self, gold: tuple[Node, ...], predicted: tuple[Node, ...]) -> bool:
        return len(gold) == len(predicted) and all(self.answers(g, p) for g, p in zip(gold, predicted, strict=True))

    def matrices(self, gold: tuple, predicted: tuple | None) -> bool:
        if predicted is None or len(gold) != len(predicted):
            return False
        return all(self.in_order(g, p) for g, p in zip(gold, predicted, strict=True))

    def collections(self, gold: Node, predicted: Node) -> bool:
        """Lists and sets in any order; a tuple, or values for named unknowns, in theirs."""
        if {gold[0], predicted[0]} == {"tuple", "set"}:
            return False  # a point is no set
        g, p = items_of(gold), items_of(predicted)
        if any(item == ("atom", "...") for item in g + p):
            return self.in_order(g, p)
        gold_names, names = assignments(g), assignments(p)
        if gold_names and names:
            return set(gold_names) == set(names) and all(self.answers(v, names[k]) for k, v in gold_names.items())
        ordered = "tuple" in (gold[0], predicted[0]) or bool(gold_names or names)
        g, p = ([unnamed(item)[1] for item in side] for side in (g, p))
        if ordered:
            return self.in_order(tuple(g), tuple(p))
        if len(g) != len(p) and (gold[0] == "set" or predicted[0] == "set" or g[0][0] == "tuple"):
            g, p = self.distinct(g), self.distinct(p)
        return self.any_order(g, p)

    def distinct(self, items: list[Node]) -> list[Node]:
        found: list[Node] = []
        for item in items[:MAX_ITEMS]:
            if not any(self.answers(other, item) for other in found):
                found.append(item)
        return found

    def any_order(self, gold: list[Node], predicted: list[Node]) -> bool:
        if len(gold) != len(predicted) or len(gold) > MAX_ITEMS:
            return False
        left = list(predicted)
        for item in gold:
            match = next((i for i, other in enumerate(left) if self.answers(item, other)), None)
            if match is None:
                return False
            left.pop(match)
        return True

    def interval_sets(self, gold: Node, predicted: Node) -> bool:
        """Unions, intervals, set builders and inequalities in one unknown, piece by piece."""
        g, p = intervals.pieces(gold), intervals.pieces(predicted)
        if g is None or p is None or len(g) != len(p):
            return False
        left = list(p)
        for piece in g:
            match = next((i for i, other in enumerate(left) if self.pieces(piece, other)), None)
            if match is None:
                return False
            left.pop(match)
        return True

    def pieces(self, gold: intervals.Piece, predicted: intervals.Piece) -> bool:
        if (gold.low_closed, gold.high_closed) != (predicted.low_closed, predicted.high_closed):
            return False
        return self.answers(gold.low, predicted.low) and self.answers(gold.high, predicted.high)

    # -- relations -----------------------------------------------------------------------------------------------
    def relations(self, gold: Node, predicted: Node) -> bool:
        """The same chain (read from either end), or one relation that is the other times a constant."""
        (_, g, g_ops), (_, p, p_ops) = gold, predicted
        flipped = tuple(_FLIPPED.get(op, op) for op in reversed(p_ops))
        if g_ops == p_ops and len(g) > 2 and self.in_order(g, p):
            return True
        if g_ops == flipped and len(g) > 2 and self.in_order(g, tuple(reversed(p))):
            return True
        if len(g) != 2 or len(p) != 2:
            return False
        if g_ops[0] not in ("=", "!=", "<", "<=", ">", ">="):
            return g_ops == p_ops and self.in_order(g, p)
        signed = g_ops[0] not in ("=", "!=")
        left = ("add", (g[0], ("neg", g[1])))
        if g_ops == p_ops and self.proportional(left, ("add", (p[0], ("neg", p[1]))), signed):
            return True
        return signed and g_ops == flipped and self.proportional(left, ("add", (p[1], ("neg", p[0]))), signed)

    def proportional(self, gold: Node, predicted: Node, signed: bool) -> bool:
        """Whether gold = c * predicted with one constant c, positive where `signed`, not zero."""
        if not has_variables(gold) or not has_variables(predicted):
            return False
        self.note("symbolic")
        first: dict[Arithmetic, Value] = {}

        def agree(arithmetic: Arithmetic, g: Value, p: Value) -> bool | None:
            if g == 0 and p == 0:
                return None
            try:
                ratio = arithmetic.divide(g, p)
                if signed and arithmetic.sign(ratio) <= 0 or arithmetic.equal(ratio, Fraction(0)):
                    return False
            except (Undefined, TooLarge):
                return False
            return arithmetic.equal(ratio, first.setdefault(arithmetic, ratio))

        return self.everywhere(gold, predicted, agree)


def _is_whole(node: Node) -> bool:
    inner = node[1] if node[0] == "neg" else node
    return inner[0] == "num" and inner[1].denominator == 1


def _constants(node: Node) -> set[str]:
    return {part[1] for part in walk(node) if part[0] == "const"}
