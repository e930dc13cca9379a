"""Kinds of answers: a number with its unit, a list of items, plus-minus, a matrix, a time of day."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from oreal_megatron.math_equality import units
from oreal_megatron.math_equality.tree import Node, walk

MAX_MATRIX = 36  # scalar products in a product of matrices that is computed
Rows: TypeAlias = tuple[tuple[Node, ...], ...]  # entries of a matrix


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number or expression, with its unit and percent sign apart."""

    node: Node
    unit: str | None  # None: nothing was written
    percent: bool


def quantity(node: Node) -> Quantity:
    """Separate unit, degree and percent signs from an expression."""
    if node[0] == "deg":
        return Quantity(node[1], "degree", False)
    if node[0] == "pct":
        return Quantity(node[1], None, True)
    if node[0] == "unit":
        return _measured(node)
    if node[0] == "neg":
        inner = quantity(node[1])
        return Quantity(("neg", inner.node), inner.unit, inner.percent)
    if node[0] == "add" and node[1][-1][0] in ("unit", "deg", "pct"):
        last = quantity(node[1][-1])
        if not any(part[0] in ("unit", "deg", "pct") for item in node[1][:-1] for part in walk(item)):
            return Quantity(("add", node[1][:-1] + (last.node,)), last.unit, last.percent)
    if node[0] == "mul" and node[1][-1][0] == "deg":
        return Quantity(("mul", node[1][:-1] + (node[1][-1][1],)), "degree", False)
    return Quantity(node, None, False)


def _measured(node: Node) -> Quantity:
    """Separate the words behind a number. Words that are no unit stay in the node, which then has no value."""
    factor, words = units.scaled(node[2])
    inner, unit = quantity(node[1]), units.canonical(words) if words else None
    number = inner.node if factor == 1 else ("mul", (inner.node, ("num", Fraction(factor), None)))
    if unit is not None and unit.startswith("per "):
        unit = f"{inner.unit} {unit}"
    elif unit is None and words or unit and inner.unit not in (None, unit) or inner.percent and unit != "percent":
        return Quantity(node, None, False)
    percent = unit == "percent" or inner.percent
    return Quantity(number, None if percent else unit or inner.unit, percent)


def is_set(node: Node) -> bool:
    """Return whether a node is a set in braces, or the empty set."""
    return node[0] == "set" or node == ("const", "empty")


def same_order(gold: Sequence[Node], predicted: Sequence[Node]) -> tuple[tuple[Node, ...], tuple[Node, ...]] | None:
    """Return the values of (x, y) = (1, 2) and (y, x) = (2, 1) in one order; None for other relations."""
    sides = (*gold, *predicted)
    if any(side[:3] != ("tuple", "(", ")") for side in sides) or len({len(side[3]) for side in sides}) > 1:
        return None
    names, values = gold[0][3], predicted[0][3]
    if any(name[0] != "atom" for name in names) or sorted(names) != sorted(values) or len(set(names)) < len(names):
        return None
    order = [values.index(name) for name in names]
    return (gold[1],), (("tuple", "(", ")", tuple(predicted[1][3][i] for i in order)),)


def correspondence(items: tuple[Node, ...], ops: tuple[str, ...]) -> list[str] | None:
    """Return the pairs of corners of two similar or congruent triangles; None for other relations."""
    if ops[0] not in ("cong", "sim") or any(item[:2] != ("fn", "triangle") for item in items):
        return None
    first, second = (re.findall(r"[A-Z](?:'*|_\{?\d\}?)", item[2][0][1]) for item in items)
    return sorted(f"{a}{b}" for a, b in zip(first, second, strict=True)) if len(first) == len(second) == 3 else None


def lettered(quantity: Quantity, other: Quantity) -> Quantity:
    """Read 5m, 5m^2 and 5L as 5 metres, 5 square metres and 5 litres where the other side has such a unit."""
    node = quantity.node
    if quantity.unit is not None or other.unit is None or node[0] not in ("mul", "div"):
        return quantity
    if node[0] == "div":
        return _letters_per_letter(quantity, other)
    *factors, last = node[1]
    last, power = (last[1], last[2]) if last[0] == "pow" else (last, ("num", Fraction(1), None))
    unit = units.letter(last[1], int(power[1])) if last[0] == "atom" and power[0] == "num" else None
    if unit is None or units.factor(other.unit, unit) is None or other.unit == "unit":
        return quantity
    return Quantity(factors[0] if len(factors) == 1 else ("mul", tuple(factors)), unit, quantity.percent)


def _letters_per_letter(quantity: Quantity, other: Quantity) -> Quantity:
    """Read 15m/s and 9.8m/s^2 as a rate where the other side has that unit."""
    top, bottom = quantity.node[1:]
    below, power = (bottom[1], f"^{bottom[2][1]}") if bottom[0] == "pow" and bottom[2][0] == "num" else (bottom, "")
    if top[0] != "mul" or top[1][-1][0] != "atom" or below[0] != "atom" or other.unit is None:
        return quantity
    *factors, last = top[1]
    if units.canonical(f"{last[1]}/{below[1]}{power}") != other.unit:
        return quantity
    return Quantity(factors[0] if len(factors) == 1 else ("mul", tuple(factors)), other.unit, quantity.percent)


def is_time(node: Node) -> bool:
    """Return whether a ratio is a time of day: 12:30, 10:45; its second part is minutes, not in lowest terms."""
    if node[0] != "ratio" or len(node[1]) != 2 or not all(part[0] == "num" for part in node[1]):
        return False
    hour, minute = node[1][0][1], node[1][1][1]
    integers = hour.denominator == minute.denominator == 1
    return bool(integers and hour <= 24 and 10 <= minute < 60 and math.gcd(int(hour), int(minute)) > 1)


def is_infinite(node: Node) -> int:
    """Return 1 for infinity, -1 for minus infinity, else 0."""
    sign = 1
    while node[0] == "neg" or node[0] == "add" and len(node[1]) == 1:
        sign, node = (-sign, node[1]) if node[0] == "neg" else (sign, node[1][0])
    return sign if node == ("const", "inf") else 0


def items_of(node: Node) -> tuple[Node, ...]:
    """Return the items of a list, set or tuple in round brackets; a single answer is a list of one.

    A plus-minus counts as two items.
    """
    if node[0] == "tuple":
        return node[3] if node[1:3] == ("(", ")") else (node,)
    items = node[1] if node[0] in ("list", "set") else (node,)
    flat: list[Node] = []
    for item in items:
        item = plus_minus(item)
        if item[0] == "rel" and set(item[2]) <= {"="} and (signed := plus_minus(item[1][-1]))[0] == "list":
            flat.extend(("rel", item[1][:-1] + (value,), item[2]) for value in signed[1])
        elif item[0] == "list" and node[0] != "list" or item[0] == "list" and item[-1] == "signs":
            flat.extend(item[1])
        else:
            flat.append(item)
    return tuple(flat)


def plus_minus(node: Node) -> Node:
    r"""Return a \pm b as the list a + b, a - b; other nodes unchanged. All signs of an expression change together."""
    if node[0] in ("rel", "list", "set", "tuple", "union") or not any(part[0] == "pm" for part in walk(node)):
        return node
    return ("list", (_signed(node, 1), _signed(node, -1)), "signs")


def _signed(node: Node, sign: int) -> Node:
    if node and node[0] == "pm":
        inner = _signed(node[2], sign)
        return inner if (node[1] == "pm") == (sign > 0) else ("neg", inner)
    return tuple(_signed(part, sign) if isinstance(part, tuple) else part for part in node)


def matrix_rows(node: Node) -> Rows | None:
    """Return the rows of a matrix, or of a sum, difference or product of matrices; None for other nodes."""
    if node[0] == "matrix":
        rows: Rows = node[1]
        return rows
    if not any(part[0] == "matrix" for part in walk(node)):
        return None
    if node[0] == "neg":
        return _scaled(("num", Fraction(-1), None), matrix_rows(node[1]))
    if node[0] == "add":
        return _combined(node[1], _summed)
    if node[0] == "mul":
        return _combined(node[1], _multiplied)
    return None


def _combined(items: tuple[Node, ...], combine: Callable[[Node, Node], Node | None]) -> Rows | None:
    """Combine items, each of them rows or a scalar node, from the left; None where the result is no matrix."""
    total: Node = matrix_rows(items[0]) or items[0]
    for item in items[1:]:
        combined = combine(total, matrix_rows(item) or item)
        if combined is None:
            return None
        total = combined
    return total if _is_rows(total) else None


def _is_rows(value: Node) -> bool:
    """Return whether a value is the rows of a matrix; the first item of a scalar node is the name of its kind."""
    return bool(value) and isinstance(value[0], tuple)


def _scaled(scalar: Node, rows: Rows | None) -> Rows | None:
    return None if rows is None else tuple(tuple(("mul", (scalar, entry)) for entry in row) for row in rows)


def _summed(a: Node, b: Node) -> Node | None:
    if not (_is_rows(a) and _is_rows(b)) or [len(row) for row in a] != [len(row) for row in b]:
        return None
    return tuple(tuple(("add", pair) for pair in zip(r, s, strict=True)) for r, s in zip(a, b, strict=True))


def _multiplied(a: Node, b: Node) -> Node | None:
    if not _is_rows(a):
        return _scaled(a, b) if _is_rows(b) else ("mul", (a, b))
    if not _is_rows(b):
        return _scaled(b, a)
    if any(len(row) != len(b) for row in a) or len(a) * len(b) * len(b[0]) > MAX_MATRIX:
        return None
    columns = list(zip(*b, strict=True)) if len({len(row) for row in b}) == 1 else []
    return tuple(
        tuple(("add", tuple(("mul", pair) for pair in zip(row, column, strict=True))) for column in columns)
        for row in a
    )
