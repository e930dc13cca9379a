"""Sets of reals written as intervals, unions, set builders or inequalities in one unknown, as one list of pieces."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from typing import Any, NamedTuple

from oreal_megatron.math_equality.evaluator import Evaluator, has_variables, is_opaque
from oreal_megatron.math_equality.shapes import is_infinite
from oreal_megatron.math_equality.tree import Node, key
from oreal_megatron.math_equality.values import Arithmetic, TooLarge, Undefined

MAX_PIECES = 60
END_WORK = 300  # nodes visited for one end of a piece
INEQUALITIES = frozenset(("<", "<=", ">", ">=", "!="))
_INFINITY = ("const", "inf")
_MINUS_INFINITY = ("neg", _INFINITY)
_EVERYTHING = frozenset(("all real numbers", "all reals", "all real number", "real numbers", "any real number"))
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_SCALE = 400  # bits behind the point by which ends are told apart
_ENDS = Arithmetic(600)


class Unreadable(ValueError):
    """The tree is no set of reals that this file reads."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One interval; a single point is a closed interval from itself to itself."""

    low: Node
    high: Node
    low_closed: bool
    high_closed: bool

    def cuts(self) -> tuple[tuple[Any, bool], tuple[Any, bool]]:
        """Where the piece begins and ends: at a number, and above it or not. Raises Unreadable for lettered ends."""
        return (_number(self.low), not self.low_closed), (_number(self.high), self.high_closed)


class RealSet(NamedTuple):
    """`unknown`: the name in the inequalities; empty where none is written, or a set builder binds it."""

    unknown: str
    pieces: list[Piece]


def read(node: Node) -> RealSet | None:
    """The set, its pieces in order and without overlaps, or None where the tree is none."""
    try:
        found = _read(node)
        return RealSet(found.unknown, _merged(found.pieces))
    except Unreadable:
        return None


def is_condition(node: Node) -> bool:
    """A list with inequalities in it."""
    return node[0] == "list" and any(item[0] == "rel" and INEQUALITIES & set(item[2]) for item in node[1])


def _read(node: Node) -> RealSet:
    kind = node[0]
    if kind == "tuple" and len(node[3]) == 2:
        return RealSet("", [Piece(*node[3], node[1] == "[", node[2] == "]")])
    if kind == "union":
        return _joined([_read(item) for item in node[1]], _all_pieces)
    if kind == "list":
        return _conditions(node)
    if kind == "set":
        return RealSet("", [Piece(item, item, True, True) for item in node[1]])
    if kind == "such":
        return _builder(node[1], node[2])
    if kind == "rel":
        return _relation(node)
    if kind == "meet":
        return _joined([_read(node[1]), _read(node[2])], _met)
    if kind in ("minus", "add"):
        return _without(node)
    if node == ("const", "set R") or kind == "word" and node[1].lower() in _EVERYTHING:
        return RealSet("", [Piece(_MINUS_INFINITY, _INFINITY, False, False)])
    if node == ("const", "empty"):
        return RealSet("", [])
    raise Unreadable


def _joined(sets: list[RealSet], combine) -> RealSet:
    """Sets in one unknown, combined."""
    names = {found.unknown for found in sets} - {""}
    if len(names) > 1:
        raise Unreadable
    return RealSet(names.pop() if names else "", reduce(combine, (found.pieces for found in sets)))


def _all_pieces(first: list[Piece], second: list[Piece]) -> list[Piece]:
    return first + second


def _conditions(node: Node) -> RealSet:
    """Conditions: any of them ("or"), all of them ("and"); behind commas all of them where they can hold together."""
    if not all(item[0] in ("rel", "tuple", "union") for item in node[1]):
        raise Unreadable
    sets = [_read(item) for item in node[1]]
    if not is_condition(node) or node[-1] == "or":
        return _joined(sets, _all_pieces)
    together = _joined(sets, _met)
    if node[-1] == "and" and not together.pieces:
        raise Unreadable
    return together if together.pieces else _joined(sets, _all_pieces)


def _builder(bound: Node, condition: Node) -> RealSet:
    """{x | 1 < x}, {x in R | 1 < x}."""
    if bound[0] == "rel" and bound[1][1:] != (("const", "set R"),):
        raise Unreadable
    name = bound[1][0] if bound[0] == "rel" else bound
    found = _read(condition)
    if condition[0] not in ("rel", "list") or found.unknown != key(name):
        raise Unreadable
    return RealSet("", found.pieces)


def _without(node: Node) -> RealSet:
    r"""R \ {a}, (0, 9) - [1, 2]."""
    whole, removed = (node[1], node[2]) if node[0] == "minus" else (node[1][0], node[1][-1])
    if node[0] == "add":
        if len(node[1]) != 2 or removed[0] != "neg" or removed[1][0] not in ("set", "tuple", "union"):
            raise Unreadable
        removed = removed[1]
    rest = [Piece(_MINUS_INFINITY, _INFINITY, False, False)]
    for piece in _read(removed).pieces:
        around = _half_line(piece.low, "<" if piece.low_closed else "<=")
        rest = _met(rest, around + _half_line(piece.high, ">" if piece.high_closed else ">="))
    return RealSet("", _met(_read(whole).pieces, rest))


# -- inequalities ------------------------------------------------------------------------------------------------
def _relation(node: Node) -> RealSet:
    """x > 3, 0 < x <= 5, |x - 1| < 2, 1 - 2x < 5, x != 3, x in (0, 1): links of a chain hold together."""
    _, items, ops = node
    if ops == ("in",) and _is_unknown(items[0]):
        return RealSet(key(items[0]), _read(items[1]).pieces)
    links = [_link(a, op, b) for a, op, b in zip(items, ops, items[1:], strict=False)]
    return _joined(links, _met)


def _link(left: Node, op: str, right: Node) -> RealSet:
    if has_variables(left) == has_variables(right) or op not in INEQUALITIES | {"="}:
        raise Unreadable
    return _solved(left, op, right) if has_variables(left) else _solved(right, _TURNED.get(op, op), left)


def _solved(unknown: Node, op: str, bound: Node) -> RealSet:
    """Takes signs, sums and factors off the unknown."""
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
        raise Unreadable
    if unknown[0] == "add":
        return _solved(lettered[0], op, ("add", (bound, *(("neg", part) for part in plain))))
    return _scaled(lettered[0], op, ("div", bound, ("mul", plain)), ("mul", plain))


def _scaled(unknown: Node, op: str, bound: Node, factor: Node) -> RealSet:
    """The rest of c * unknown after c is divided away: a negative one turns the relation."""
    sign = _number(factor)
    if sign == 0:
        raise Unreadable
    return _solved(unknown, _TURNED.get(op, op) if sign < 0 else op, bound)


def _absolute(inner: Node, op: str, bound: Node) -> RealSet:
    below, above = _solved(inner, _TURNED.get(op, op), ("neg", bound)), _solved(inner, op, bound)
    return _joined([below, above], _met if op in ("<", "<=", "!=") else _all_pieces)


def _is_unknown(node: Node) -> bool:
    """A letter with or without an index, or f(x)."""
    return node[0] == "atom" or is_opaque(node)


def _half_line(bound: Node, op: str) -> list[Piece]:
    below = Piece(_MINUS_INFINITY, bound, False, op == "<=")
    above = Piece(bound, _INFINITY, op == ">=", False)
    point = Piece(bound, bound, True, True)
    return {"<": [below], "<=": [below], ">": [above], ">=": [above], "!=": [below, above], "=": [point]}[op]


# -- pieces on the number line -----------------------------------------------------------------------------------
def _number(node: Node) -> Any:
    """An end as a number to sort by."""
    if sign := is_infinite(node):
        return sign * _ENDS.context.inf
    try:
        value = None if has_variables(node) else Evaluator(_ENDS, lambda name: Fraction(1), END_WORK).value(node)
    except (Undefined, TooLarge):
        value = None
    if value is None or not _ENDS.is_real(value):
        raise Unreadable
    return _ENDS.context.nint(_ENDS.context.re(_ENDS.ball(value).middle) * 2**_SCALE)


def _merged(pieces: list[Piece]) -> list[Piece]:
    """In order, with what overlaps or touches made one. Pieces with lettered ends stay as they are."""
    if len(pieces) > MAX_PIECES:
        raise Unreadable
    try:
        rows = sorted(((piece.cuts(), piece) for piece in pieces), key=lambda row: row[0])
    except Unreadable:
        return pieces
    found: list[Piece] = []
    for (low, high), piece in rows:
        if low >= high:
            raise Unreadable  # (3, 1)
        if not found or low > found[-1].cuts()[1]:
            found.append(piece)
        elif high > found[-1].cuts()[1]:
            found[-1] = replace(found[-1], high=piece.high, high_closed=piece.high_closed)
    return found


def _met(first: list[Piece], second: list[Piece]) -> list[Piece]:
    """What lies in both."""
    if len(first) * len(second) > MAX_PIECES:
        raise Unreadable
    found = []
    for a in first:
        for b in second:
            low, high = max(a, b, key=lambda p: p.cuts()[0]), min(a, b, key=lambda p: p.cuts()[1])
            piece = Piece(low.low, high.high, low.low_closed, high.high_closed)
            if piece.cuts()[0] < piece.cuts()[1]:
                found.append(piece)
    return found
