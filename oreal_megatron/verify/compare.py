"""Are two trees the same answer? Lists, tuples, sets, intervals, matrices and relations, down to their values."""

from __future__ import annotations

from fractions import Fraction

from oreal_megatron.verify import intervals
from oreal_megatron.verify.evaluate import has_variables
from oreal_megatron.verify.scalars import Scalars
from oreal_megatron.verify.shapes import (
    assignments,
    items_of,
    lettered,
    matrix_rows,
    plus_minus,
    quantity,
    unnamed,
)
from oreal_megatron.verify.tree import Node, key
from oreal_megatron.verify.values import Arithmetic, TooLarge, Undefined, Value

MAX_ITEMS = 60  # of a list compared in any order
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


class Same(Scalars):
    """One comparison of two answers."""

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
        if gold[0] != predicted[0] and ("const", "empty") in g + p:
            return False  # the set of the empty set is not empty
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
