"""Comparison of two answers: lists, tuples, sets, intervals, matrices and relations, down to their values."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from oreal_megatron.math_equality import intervals
from oreal_megatron.math_equality.compare_values import ValueComparison
from oreal_megatron.math_equality.evaluator import has_variables
from oreal_megatron.math_equality.shapes import (
    Rows,
    correspondence,
    is_set,
    is_time,
    items_of,
    lettered,
    matrix_rows,
    plus_minus,
    quantity,
    same_order,
)
from oreal_megatron.math_equality.tree import Node, key, rename_letters, walk
from oreal_megatron.math_equality.values import Arithmetic, TooLarge, Undefined, Value
from oreal_megatron.math_equality.variable_names import (
    assignments,
    is_plain_name,
    named,
    renaming,
    same_name,
    split_approximation,
    unindexed,
    without_parameter,
)

MAX_ITEMS = 60  # of a list compared in any order
_TEN = ("num", Fraction(10), None)
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


class AnswerComparison(ValueComparison):
    """One comparison of two answers. Its methods take a part of the gold and a part of the prediction."""

    # -- answers -------------------------------------------------------------------------------------------------
    def answers(self, gold: Node, predicted: Node) -> bool:
        """Return whether `predicted` is the answer `gold`."""
        gold, predicted = plus_minus(gold), plus_minus(predicted)
        if key(gold) == key(predicted):
            self.note("exact" if gold[0] == "num" else "symbolic")
            return True
        if gold[0] == "rel" and "~" in gold[2] or predicted[0] == "rel" and "~" in predicted[2]:
            return self.approximations(gold, predicted)
        if (heads := without_parameter(gold, predicted)) is not None:
            return self.answers(*heads)
        if gold[0] == "rel" and predicted[0] == "rel" and self.relations(gold, predicted):
            return True
        if gold[0] == predicted[0] == "rel" and (intervals.INEQUALITIES | {"in"}) & {*gold[2], *predicted[2]}:
            if (same := self.interval_sets(gold, predicted)) is not None:
                return same
        values = self.without_names(gold, predicted)
        return values is not None and self.unnamed_answers(*values)

    def approximations(self, gold: Node, predicted: Node) -> bool:
        """Compare answers of which one is followed by its own rounding: sqrt(5) ~ 2.236 is sqrt(5)."""
        (exact, roundings), (value, others) = split_approximation(gold), split_approximation(predicted)
        sides = ((exact, roundings), (value, others))
        if not all(self.is_rounding(v, other) for v, near in sides if v[0] != "rel" for other in near):
            return False  # where a name stands in front, x = 1/3 ~ 1.3, the value behind it counts
        if (exact, value) == (gold, predicted):  # x ~ 3: the name of a value
            values = self.without_names(gold, predicted)
            return values is not None and self.unnamed_answers(*values)
        if self.answers(exact, value):
            return True
        return (
            bool(others) and not roundings and exact[0] == "num" and bool(exact[2]) and self.answers(exact, others[-1])
        )

    def is_rounding(self, exact: Node, decimal: Node) -> bool:
        """Return whether `exact` rounds to the decimal as it is written; other values may be off by a hundredth."""
        exact = exact[1][-1] if exact[0] == "rel" else exact
        left, right = (side if (q := quantity(side)).percent else q.node for side in (exact, decimal))
        if has_variables(left) or has_variables(right):
            return True
        if quantity(decimal).unit == "degree" and quantity(exact).unit is None and not left[0] == "num":
            left = ("div", ("mul", (("num", Fraction(180), None), left)), ("const", "pi"))
        return self.is_near(left, right, _last_place(right))

    def without_names(self, gold: Node, predicted: Node) -> tuple[Node, Node] | None:
        """Return the values of two assignments.

        None where they belong to different unknowns, or where the prediction contradicts itself (x = 6 = 5).
        """
        (gold_name, golds), (name, values) = named(gold), named(predicted)
        if gold_name is None:
            golds = (gold,)
        elif name is None and len(values) > 1:
            return None  # x = 5 is not 5 = 5
        if name is not None and gold_name is not None and not same_name(gold_name, name):
            letters = renaming(gold_name, name)
            if not letters:
                return None  # x = 5 is not y = 5
            predicted = values[-1]
            values = (rename_letters(predicted, letters),)
            if any(part[0] == "atom" and part[1] in set(letters.values()) - set(letters) for part in walk(predicted)):
                return None  # f(t) = x is not f(x) = x
        if name is not None and gold_name is None and not is_plain_name(name):
            return None
        if not all(has_variables(value) or self.answers(values[-1], value) for value in values[:-1]):
            return None
        return plus_minus(golds[-1]), plus_minus(values[-1])

    def unnamed_answers(self, gold: Node, predicted: Node) -> bool:
        """Compare two answers without names, by their kinds."""
        kinds = {gold[0], predicted[0]}
        if intervals.is_condition(gold) or intervals.is_condition(predicted):
            same = self.interval_sets(gold, predicted)
            alike = gold[0] == predicted[0] == "list" and gold[2:] == predicted[2:]
            return alike and self.collections(gold, predicted) if same is None else same
        if kinds & {"list", "set"} and not kinds & {"union", "such", "minus", "meet"}:
            return self.collections(gold, predicted)
        if kinds == {"tuple"}:
            return gold[1:3] == predicted[1:3] and self.in_order(gold[3], predicted[3])
        if kinds & {"tuple", "union", "such", "minus", "rel", "meet"} or ("const", "set R") in (gold, predicted):
            return bool(self.interval_sets(gold, predicted))
        if kinds & {"word"}:
            return False
        if (rows := matrix_rows(gold)) is not None:
            return self.matrices(rows, matrix_rows(predicted))
        if kinds & {"ratio"}:
            return self.ratios(gold, predicted)
        measures = quantity(gold), quantity(predicted)
        return self.quantities(lettered(*measures), lettered(*reversed(measures)))

    def ratios(self, gold: Node, predicted: Node) -> bool:
        """Compare ratios: 2:3 is 4:6 and 2/3; a time of day, or a ratio with a zero, is compared as written."""
        if gold[0] != predicted[0]:
            return not is_time(gold) and self.scalars(gold, predicted)
        g, p = gold[1], predicted[1]
        if len(g) != len(p) or self.in_order(g, p) or is_time(gold):
            return self.in_order(g, p)
        zero = ("num", Fraction(0), None)
        if any(self.scalars(zero, item) for item in g + p):
            return False
        return all(self.scalars(("mul", (g[0], b)), ("mul", (p[0], a))) for a, b in zip(g[1:], p[1:], strict=True))

    # -- several answers -----------------------------------------------------------------------------------------
    def in_order(self, gold: tuple[Node, ...], predicted: tuple[Node, ...]) -> bool:
        """Compare items one by one."""
        return len(gold) == len(predicted) and all(self.items(g, p) for g, p in zip(gold, predicted, strict=True))

    def items(self, gold: Node, predicted: Node) -> bool:
        """Compare two items of a list, set or tuple, where a set of one is not its element."""
        return is_set(gold) == is_set(predicted) and self.answers(gold, predicted)

    def matrices(self, gold: Rows, predicted: Rows | None) -> bool:
        """Compare matrices entry by entry."""
        if predicted is None or len(gold) != len(predicted):
            return False
        return all(self.in_order(g, p) for g, p in zip(gold, predicted, strict=True))

    def collections(self, gold: Node, predicted: Node) -> bool:
        """Compare lists and sets in any order; tuples, and values of named unknowns, in their order."""
        if {gold[0], predicted[0]} == {"tuple", "set"}:
            point, points = (gold, predicted[1]) if gold[0] == "tuple" else (predicted, gold[1])
            return (
                len(points) == 1
                and points[0][:3] == point[:3] == ("tuple", "(", ")")
                and self.answers(point, points[0])
            )
        g: Sequence[Node]
        p: Sequence[Node]
        g, p = items_of(gold), items_of(predicted)
        if gold[0] != predicted[0] and ("const", "empty") in g + p:
            return False  # the set of the empty set is not empty
        if any(item == ("atom", "...") for item in g + p):
            return self.in_order(g, p)
        named_golds, named_items = assignments(g), assignments(p)
        if named_golds and named_items:
            return self.any_order(g, p)
        if named_items and gold[0] != "tuple":
            return False  # -2, 1 is not x = -2, y = 1
        if named_golds or named_items or "tuple" in (gold[0], predicted[0]):
            return self.in_order(g, p)
        g, p = tuple(map(unindexed, g)), tuple(map(unindexed, p))
        if len(g) != len(p) and (gold[0] == "set" or predicted[0] == "set" or g[0][0] == "tuple"):
            g, p = self.distinct(g), self.distinct(p)
        return self.any_order(g, p)

    def distinct(self, items: Sequence[Node]) -> list[Node]:
        """Return the items without repetitions."""
        distinct: list[Node] = []
        for item in items[:MAX_ITEMS]:
            if not any(self.items(other, item) for other in distinct):
                distinct.append(item)
        return distinct

    def any_order(self, gold: Sequence[Node], predicted: Sequence[Node]) -> bool:
        """Compare items, matching each gold to a prediction that no other gold has taken."""
        if len(gold) != len(predicted) or len(gold) > MAX_ITEMS:
            return False
        left = list(predicted)
        for item in gold:
            match = next((i for i, other in enumerate(left) if self.items(item, other)), None)
            if match is None:
                return False
            left.pop(match)
        return True

    def interval_sets(self, gold: Node, predicted: Node) -> bool | None:
        """Compare unions, intervals, set builders and inequalities in one unknown; None where a side is no such set."""
        g, p = intervals.read(gold), intervals.read(predicted)
        if g is None or p is None:
            return None
        applied = p.unknown.startswith("fn(") and not p.unknown.startswith("fn(_")
        if g.unknown != p.unknown and (g.unknown and p.unknown or applied) or len(g.intervals) != len(p.intervals):
            return False  # x > 3 is not y > 3; (3, oo) is not f(x) > 3
        return all(self.interval_pair(*pair) for pair in zip(g.intervals, p.intervals, strict=True))

    def interval_pair(self, gold: intervals.Interval, predicted: intervals.Interval) -> bool:
        """Compare two intervals: their ends, and which of them belong to the interval."""
        if (gold.low_closed, gold.high_closed) != (predicted.low_closed, predicted.high_closed):
            return False
        return self.answers(gold.low, predicted.low) and self.answers(gold.high, predicted.high)

    # -- relations -----------------------------------------------------------------------------------------------
    def relations(self, gold: Node, predicted: Node) -> bool:
        """Compare relations: the same chain from either end, or one relation that is the other times a constant."""
        (_, g, g_ops), (_, p, p_ops) = gold, predicted
        flipped = tuple(_FLIPPED.get(op, op) for op in reversed(p_ops))
        if g_ops == p_ops and len(g) > 2 and self.in_order(g, p):
            return True
        if g_ops == flipped and len(g) > 2 and self.in_order(g, tuple(reversed(p))):
            return True
        if len(g) != 2 or len(p) != 2:
            return False
        if g_ops == p_ops == ("=",) and (points := same_order(g, p)) is not None:
            return self.in_order(*points)
        if g_ops[0] not in ("=", "!=", "<", "<=", ">", ">="):
            corners = correspondence(g, g_ops)
            alike = corners is not None and corners == correspondence(p, p_ops)
            return g_ops == p_ops and (alike or self.in_order(g, p))
        signed = g_ops[0] not in ("=", "!=")
        left = ("add", (g[0], ("neg", g[1])))
        if g_ops == p_ops and self.proportional(left, ("add", (p[0], ("neg", p[1]))), signed):
            return True
        return signed and g_ops == flipped and self.proportional(left, ("add", (p[1], ("neg", p[0]))), signed)

    def proportional(self, gold: Node, predicted: Node, signed: bool) -> bool:
        """Return whether gold = c * predicted with one constant c: not zero, and positive where `signed`."""
        if not has_variables(gold) or not has_variables(predicted):
            return False
        self.note("symbolic")
        first: dict[Arithmetic, Value] = {}

        def agree(arithmetic: Arithmetic, g: Value, p: Value) -> bool | None:
            zeros = [arithmetic.same(value, Fraction(0)) is not False for value in (g, p)]
            if any(zeros):
                return None if all(zeros) else False
            try:
                ratio = arithmetic.divide(g, p)
                if signed and arithmetic.sign(ratio) <= 0:
                    return False
            except (Undefined, TooLarge):
                return None
            return arithmetic.same(ratio, first.setdefault(arithmetic, ratio))

        return self.everywhere(gold, predicted, agree)


def _last_place(node: Node) -> Fraction | None:
    """Return half a unit of the last digit of a decimal, also of 1.5 x 10^6; None for other values."""
    inner = node[1] if node[0] == "neg" else node
    if inner[0] == "num":
        return Fraction(1, 2 * 10 ** (inner[2] or 0)) if inner[2] or inner[1].denominator == 1 else None
    if inner[0] != "mul" or len(inner[1]) != 2 or inner[1][1][0] != "pow" or inner[1][1][1] != _TEN:
        return None
    mantissa, (_, _, exponent) = inner[1]
    exponent = (
        exponent[1]
        if exponent[0] == "num"
        else -exponent[1][1]
        if exponent[0] == "neg" and exponent[1][0] == "num"
        else 0
    )
    half = _last_place(mantissa)
    return (
        None
        if half is None or abs(exponent) > 300 or exponent.denominator != 1
        else half * Fraction(10) ** int(exponent)
    )
