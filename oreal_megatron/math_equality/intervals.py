"""Sets of reals written as intervals, unions, set builders or inequalities in one unknown: one list of intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from typing import Any, NamedTuple

from oreal_megatron.math_equality.evaluator import Evaluator, has_variables, is_opaque
from oreal_megatron.math_equality.shapes import is_infinite
from oreal_megatron.math_equality.tree import Node, key
from oreal_megatron.math_equality.values import Arithmetic, TooLarge, Undefined

MAX_INTERVALS = 60
END_WORK = 300  # nodes visited for one end of an interval
INEQUALITIES = frozenset(("<", "<=", ">", ">=", "!="))
_INFINITY = ("const", "inf")
_MINUS_INFINITY = ("neg", _INFINITY)
_EVERYTHING = frozenset(("all real numbers", "all reals", "all real number", "real numbers", "any real number"))
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_SCALE = 400  # bits behind the point to which ends are compared
_ENDS = Arithmetic(600)


class NotARealSet(ValueError):
    """The tree is no set of reals that this module reads."""


@dataclass(frozen=True, slots=True)
class Interval:
    """One interval; a point is a closed interval from itself to itself."""

    low: Node
    high: Node
    low_closed: bool
    high_closed: bool

    def bounds(self) -> tuple[tuple[Any, bool], tuple[Any, bool]]:
        """Return both ends as (number, whether the end lies just above it). Raises NotARealSet for lettered ends."""
        return (_number(self.low), not self.low_closed), (_number(self.high), self.high_closed)


class RealSet(NamedTuple):
    """Intervals, and the name in the inequalities; it is empty where none is written or a set builder binds it."""

    unknown: str
    intervals: list[Interval]


def read(node: Node) -> RealSet | None:
    """Return the set with its intervals in order and without overlaps, or None where the tree is none."""
    try:
        real_set = _read(node)
        return RealSet(real_set.unknown, _merged(real_set.intervals))
    except NotARealSet:
        return None


def is_condition(node: Node) -> bool:
    """Return whether a node is a list with inequalities in it."""
    return bool(node[0] == "list" and any(item[0] == "rel" and INEQUALITIES & set(item[2]) for item in node[1]))


def _read(node: Node) -> RealSet:
    kind = node[0]
    if kind == "tuple" and len(node[3]) == 2:
        low, high = node[3]
        return RealSet("", [Interval(low, high, node[1] == "[", node[2] == "]")])
    if kind == "union":
        return _joined([_read(item) for item in node[1]], _union)
    if kind == "list":
        return _conditions(node)
    if kind == "set":
        return RealSet("", [Interval(item, item, True, True) for item in node[1]])
    if kind == "such":
        return _builder(node[1], node[2])
    if kind == "rel":
        return _relation(node)
    if kind == "meet":
        return _joined([_read(node[1]), _read(node[2])], _intersection)
    if kind in ("minus", "add"):
        return _difference(node)
    if node == ("const", "set R") or kind == "word" and node[1].lower() in _EVERYTHING:
        return RealSet("", [Interval(_MINUS_INFINITY, _INFINITY, False, False)])
    if node == ("const", "empty"):
        return RealSet("", [])
    raise NotARealSet


def _joined(sets: list[RealSet], combine: Callable[[list[Interval], list[Interval]], list[Interval]]) -> RealSet:
    """Combine sets in one unknown."""
    names = {real_set.unknown for real_set in sets} - {""}
    if len(names) > 1:
        raise NotARealSet
    return RealSet(names.pop() if names else "", reduce(combine, (real_set.intervals for real_set in sets)))


def _union(first: list[Interval], second: list[Interval]) -> list[Interval]:
    return first + second


def _conditions(node: Node) -> RealSet:
    """Read conditions: any of them ("or"), all of them ("and"); behind commas all, or any where no number meets all."""
    if not all(item[0] in ("rel", "tuple", "union") for item in node[1]):
        raise NotARealSet
    sets = [_read(item) for item in node[1]]
    if not is_condition(node) or node[-1] == "or":
        return _joined(sets, _union)
    together = _joined(sets, _intersection)
    if node[-1] == "and" and not together.intervals:
        raise NotARealSet
    return together if together.intervals else _joined(sets, _union)


def _builder(bound: Node, condition: Node) -> RealSet:
    """Read {x | 1 < x} and {x in R | 1 < x}."""
    if bound[0] == "rel" and bound[1][1:] != (("const", "set R"),):
        raise NotARealSet
    name = bound[1][0] if bound[0] == "rel" else bound
    real_set = _read(condition)
    if condition[0] not in ("rel", "list") or real_set.unknown != key(name):
        raise NotARealSet
    return RealSet("", real_set.intervals)


def _difference(node: Node) -> RealSet:
    r"""Read R \ {a} and (0, 9) - [1, 2]."""
    minuend, removed = (node[1], node[2]) if node[0] == "minus" else (node[1][0], node[1][-1])
    if node[0] == "add":
        if len(node[1]) != 2 or removed[0] != "neg" or removed[1][0] not in ("set", "tuple", "union"):
            raise NotARealSet
        removed = removed[1]
    remaining = [Interval(_MINUS_INFINITY, _INFINITY, False, False)]
    for interval in _read(removed).intervals:
        below = _half_line(interval.low, "<" if interval.low_closed else "<=")
        above = _half_line(interval.high, ">" if interval.high_closed else ">=")
        remaining = _intersection(remaining, below + above)
    return RealSet("", _intersection(_read(minuend).intervals, remaining))


# -- inequalities ------------------------------------------------------------------------------------------------
def _relation(node: Node) -> RealSet:
    """Read x > 3, 0 < x <= 5, |x - 1| < 2, 1 - 2x < 5, x != 3, x in (0, 1); all links of a chain hold."""
    _, items, ops = node
    if ops == ("in",) and _is_unknown(items[0]):
        return RealSet(key(items[0]), _read(items[1]).intervals)
    links = [_link(a, op, b) for a, op, b in zip(items, ops, items[1:], strict=False)]
    return _joined(links, _intersection)


def _link(left: Node, op: str, right: Node) -> RealSet:
    if has_variables(left) == has_variables(right) or op not in INEQUALITIES | {"="}:
        raise NotARealSet
    return _solved(left, op, right) if has_variables(left) else _solved(right, _TURNED.get(op, op), left)


def _solved(unknown: Node, op: str, bound: Node) -> RealSet:
    """Solve a relation for its unknown, as far as signs, sums and constant factors go."""
    if _is_unknown(unknown):
        return RealSet(key(unknown), _half_line(bound, op))
    if unknown[:2] == ("fn", "abs"):
        return _absolute(unknown[2][0], op, bound)
    if unknown[0] == "neg":
        return _solved(unknown[1], _TURNED.get(op, op), ("neg", bound))
    if unknown[0] == "div" and not has_variables(unknown[2]):
        return _scaled(unknown[1], op, ("mul", (bound, unknown[2])), unknown[2])
    parts = unknown[1] if unknown[0] in ("add", "mul") else ()
    lettered, plain = [p for p in parts if has_variables(p)], tuple(p for p in parts if not has_variables(p))
    if len(lettered) != 1 or not plain:
        raise NotARealSet
    if unknown[0] == "add":
        return _solved(lettered[0], op, ("add", (bound, *(("neg", part) for part in plain))))
    return _scaled(lettered[0], op, ("div", bound, ("mul", plain)), ("mul", plain))


def _scaled(unknown: Node, op: str, bound: Node, factor: Node) -> RealSet:
    """Solve the relation that is left after division by `factor`; a negative one reverses it."""
    sign = _number(factor)
    if sign == 0:
        raise NotARealSet
    return _solved(unknown, _TURNED.get(op, op) if sign < 0 else op, bound)


def _absolute(inner: Node, op: str, bound: Node) -> RealSet:
    """Solve |inner| op bound."""
    below, above = _solved(inner, _TURNED.get(op, op), ("neg", bound)), _solved(inner, op, bound)
    return _joined([below, above], _intersection if op in ("<", "<=", "!=") else _union)


def _is_unknown(node: Node) -> bool:
    """Return whether a node is a letter with or without an index, or f(x)."""
    return node[0] == "atom" or is_opaque(node)


def _half_line(bound: Node, op: str) -> list[Interval]:
    """Return the numbers x with x op bound."""
    below = Interval(_MINUS_INFINITY, bound, False, op == "<=")
    above = Interval(bound, _INFINITY, op == ">=", False)
    point = Interval(bound, bound, True, True)
    return {"<": [below], "<=": [below], ">": [above], ">=": [above], "!=": [below, above], "=": [point]}[op]


# -- intervals on the number line --------------------------------------------------------------------------------
def _number(node: Node) -> Any:
    """Return an end as a number to sort by."""
    if sign := is_infinite(node):
        return sign * _ENDS.context.inf
    try:
        value = None if has_variables(node) else Evaluator(_ENDS, lambda name: Fraction(1), END_WORK).value(node)
    except (Undefined, TooLarge):
        value = None
    if value is None or not _ENDS.is_real(value):
        raise NotARealSet
    return _ENDS.context.nint(_ENDS.context.re(_ENDS.ball(value).middle) * 2**_SCALE)


def _merged(intervals: list[Interval]) -> list[Interval]:
    """Sort intervals and merge those that overlap or touch. With letters at an end, return them unchanged."""
    if len(intervals) > MAX_INTERVALS:
        raise NotARealSet
    try:
        rows = sorted(((interval.bounds(), interval) for interval in intervals), key=lambda row: row[0])
    except NotARealSet:
        return intervals
    merged: list[Interval] = []
    for (low, high), interval in rows:
        if low >= high:
            raise NotARealSet  # (3, 1)
        if not merged or low > merged[-1].bounds()[1]:
            merged.append(interval)
        elif high > merged[-1].bounds()[1]:
            merged[-1] = replace(merged[-1], high=interval.high, high_closed=interval.high_closed)
    return merged


def _intersection(first: list[Interval], second: list[Interval]) -> list[Interval]:
    if len(first) * len(second) > MAX_INTERVALS:
        raise NotARealSet
    common = []
    for a in first:
        for b in second:
            low, high = max(a, b, key=lambda p: p.bounds()[0]), min(a, b, key=lambda p: p.bounds()[1])
            interval = Interval(low.low, high.high, low.low_closed, high.high_closed)
            if interval.bounds()[0] < interval.bounds()[1]:
                common.append(interval)
    return common
