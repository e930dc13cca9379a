"""Sets of reals written as intervals, unions, set builders or inequalities, as one list of pieces."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from oreal_megatron.verify.evaluate import has_variables
from oreal_megatron.verify.shapes import is_infinite
from oreal_megatron.verify.tree import Node

_INFINITY = ("const", "inf")
_MINUS_INFINITY = ("neg", _INFINITY)
_EVERYTHING = frozenset(("all real numbers", "all reals", "all real number", "real numbers", "any real number"))


@dataclass(frozen=True, slots=True)
class Piece:
    """One interval; a single point is a closed interval from itself to itself."""

    low: Node
    high: Node
    low_closed: bool
    high_closed: bool


def pieces(node: Node) -> list[Piece] | None:
    """The pieces, or None where the tree is no set of reals that this file reads."""
    kind = node[0]
    if kind == "tuple":
        return _interval(node)
    if kind == "union":
        return _joined(node[1])
    if kind == "list":
        return _joined(node[1]) if all(item[0] in ("rel", "tuple", "union") for item in node[1]) else None
    if kind == "set":
        return [Piece(item, item, True, True) for item in node[1]]
    if kind == "such":
        return pieces(node[2]) if node[2][0] in ("rel", "list") else None
    if kind == "rel":
        return pieces(node[1][1]) if node[2] == ("in",) else _inequality(node)
    if kind == "minus":
        return _without(node)
    if node == ("const", "set R") or kind == "word" and node[1].lower() in _EVERYTHING:
        return [Piece(_MINUS_INFINITY, _INFINITY, False, False)]
    return [] if node == ("const", "empty") else None


def _joined(nodes: tuple[Node, ...]) -> list[Piece] | None:
    found: list[Piece] = []
    for node in nodes:
        if (part := pieces(node)) is None:
            return None
        found.extend(part)
    return found


def _interval(node: Node) -> list[Piece] | None:
    _, opening, closing, items = node
    if len(items) != 2:
        return None
    return [Piece(items[0], items[1], opening == "[", closing == "]")]


def _inequality(node: Node) -> list[Piece] | None:
    """x > 3, 3 < x, 0 < x <= 5, |x| < 2, 1 <= |z| <= 3/2, x != 3."""
    _, items, ops = node
    closed = [not has_variables(item) for item in items]
    if len(items) == 2 and closed[0] != closed[1]:
        unknown, bound, op = (items[0], items[1], ops[0]) if closed[1] else (items[1], items[0], _turned(ops[0]))
        if unknown[0] == "fn" and unknown[1] == "abs":
            return _absolute(bound, op)
        return _half_line(bound, op)
    if len(items) == 3 and closed == [True, False, True]:
        low, unknown, high = items
        if set(ops) <= {">", ">="}:
            low, high, ops = high, low, tuple(_turned(op) for op in reversed(ops))
        if not set(ops) <= {"<", "<="}:
            return None
        piece = Piece(low, high, ops[0] == "<=", ops[1] == "<=")
        if unknown[0] == "fn" and unknown[1] == "abs":
            return [Piece(_negated(high), _negated(low), piece.high_closed, piece.low_closed), piece]
        return [piece]
    return None


def _turned(op: str) -> str:
    return {"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(op, op)


def _half_line(bound: Node, op: str) -> list[Piece] | None:
    below = Piece(_MINUS_INFINITY, bound, False, op == "<=")
    above = Piece(bound, _INFINITY, op == ">=", False)
    table = {"<": [below], "<=": [below], ">": [above], ">=": [above], "!=": [below, above]}
    return table.get(op)


def _absolute(bound: Node, op: str) -> list[Piece] | None:
    if op in ("<", "<="):
        return [Piece(_negated(bound), bound, op == "<=", op == "<=")]
    outside = (_half_line(_negated(bound), _turned(op)) or []) + (_half_line(bound, op) or [])
    return outside if op in (">", ">=") else None


def _negated(node: Node) -> Node:
    return ("num", -node[1], node[2]) if node[0] == "num" and isinstance(node[1], Fraction) else ("neg", node)


def _without(node: Node) -> list[Piece] | None:
    """R \\ {a}."""
    whole, removed = pieces(node[1]), node[2]
    if whole is None or len(whole) != 1 or removed[0] != "set" or len(removed[1]) != 1:
        return None
    if not (is_infinite(whole[0].low) < 0 < is_infinite(whole[0].high)):
        return None
    return _half_line(removed[1][0], "!=")
