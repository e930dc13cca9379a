"""What kind of answer a tree is: names in front of it, units behind it, the items in it, its two signs."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from oreal_megatron.verify import units
from oreal_megatron.verify.tree import Node, key, walk

MAX_MATRIX = 36  # entries of a product of matrices that is worked out


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number or expression without its unit."""

    node: Node
    unit: str | None  # None: nothing was written
    percent: bool


def quantity(node: Node) -> Quantity:
    """Takes unit, degree and percent signs off the outside of an expression."""
    if node[0] == "deg":
        return Quantity(node[1], "degree", False)
    if node[0] == "pct":
        return Quantity(node[1], None, True)
    if node[0] == "unit":
        unit = units.canonical(node[2])
        inner = quantity(node[1])
        if unit is None:
            return Quantity(node, None, False)  # words that are no unit: no value, so equal to nothing
        return Quantity(inner.node, None, True) if unit == "percent" else Quantity(inner.node, unit, inner.percent)
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


def lettered(quantity: Quantity, other: Quantity) -> Quantity:
    """5m and 5m^2 read as 5 metres and 5 square metres where the other side has that unit."""
    node = quantity.node
    if quantity.unit is not None or other.unit is None or node[0] != "mul":
        return quantity
    *rest, last = node[1]
    letter, _, power = other.unit.partition("^")
    unit = ("pow", ("atom", letter), ("num", Fraction(power), None)) if power.isdigit() else ("atom", letter)
    if last != unit:
        return quantity
    return Quantity(rest[0] if len(rest) == 1 else ("mul", tuple(rest)), other.unit, quantity.percent)


def is_infinite(node: Node) -> int:
    """1 for infinity, -1 for minus infinity, else 0."""
    sign = 1
    while node[0] == "neg" or node[0] == "add" and len(node[1]) == 1:
        sign, node = (-sign, node[1]) if node[0] == "neg" else (sign, node[1][0])
    return sign if node == ("const", "inf") else 0


def _is_name(node: Node, depth: int = 0) -> bool:
    """The left side of an assignment: x, a_n, f(x), AB, |AB|, angle ABC, A:B, NO/BO, (p, q)."""
    if depth > 3:
        return False
    kind = node[0]
    if kind == "atom":
        return True
    if kind == "const":
        return node[1] in ("e", "i")
    if kind == "fn":
        return node[1] in ("_", "'") or node[1] not in ("sqrt", "!", "sum", "int", "floor", "ceil", "binom")
    if kind in ("mul", "ratio"):
        return all(_is_name(item, depth + 1) for item in node[1])
    if kind == "tuple":
        return node[1:3] == ("(", ")") and all(_is_name(item, depth + 1) for item in node[3])
    if kind == "div":
        return _is_name(node[1], depth + 1) and _is_name(node[2], depth + 1)
    return kind == "word"


def unnamed(node: Node) -> tuple[str, Node]:
    """(name, value) of "x = 1 + 1 = 2", "x in S", "x = 1/3 ~ 0.33"; ("", node) where nothing is named."""
    if node[0] != "rel":
        return "", node
    items, ops = node[1], node[2]
    if ops == ("in",) and _is_name(items[0]):
        return key(items[0]), items[1]
    if not set(ops) <= {"=", "~"}:
        return "", node
    exact = len(items) if "~" not in ops else max(ops.index("~") + 1, 2)
    last = exact - 1
    if _is_name(items[0]):
        return key(items[0]), items[last]
    if len(items) == 2 and _is_name(items[1]) and items[1][0] == "atom" and not _names(items[0]):
        return key(items[1]), items[0]
    if len(items) > 2 and _is_name(items[-2]):
        return key(items[-2]), items[last]
    return "", node


def _names(node: Node) -> bool:
    return any(part[0] == "atom" for part in walk(node))


def assignments(items: tuple[Node, ...]) -> dict[str, Node]:
    """name -> value where every item names an unknown of its own: AB = 4, CD = 5. Else empty."""
    named = [unnamed(item) for item in items]
    names = [name for name, _ in named]
    stems = {name[:4] for name in names}
    if not all(names) or len(set(names)) != len(names) or len(names) < 2:
        return {}
    if len(stems) == 1 and all(name.startswith("fn(_") for name in names):
        return {}  # x_1 = 2, x_2 = 3: roots of one equation, their numbering means nothing
    return dict(named)


def items_of(node: Node) -> tuple[Node, ...]:
    """Items of a list, set or tuple in round brackets; a single answer is a list of one. Two signs count as two
    items."""
    if node[0] == "tuple":
        return node[3] if node[1:3] == ("(", ")") else (node,)
    items = node[1] if node[0] in ("list", "set") else (node,)
    found: list[Node] = []
    for item in items:
        item = plus_minus(item)
        if item[0] == "rel" and set(item[2]) <= {"="} and (signed := plus_minus(item[1][-1]))[0] == "list":
            found.extend(("rel", item[1][:-1] + (value,), item[2]) for value in signed[1])
        elif item[0] == "list" and node[0] != "list" or item[0] == "list" and item[-1] == "signs":
            found.extend(item[1])
        else:
            found.append(item)
    return tuple(found)


def plus_minus(node: Node) -> Node:
    r"""a \pm b -> the list a + b, a - b. Signs in one expression go together."""
    if node[0] in ("rel", "list", "set", "tuple", "union") or not any(part[0] == "pm" for part in walk(node)):
        return node
    return ("list", (_signed(node, 1), _signed(node, -1)), "signs")


def _signed(node: object, sign: int) -> object:
    if not isinstance(node, tuple):
        return node
    if node and node[0] == "pm":
        inner = _signed(node[2], sign)
        return inner if (node[1] == "pm") == (sign > 0) else ("neg", inner)
    return tuple(_signed(part, sign) for part in node)


def matrix_rows(node: Node) -> tuple | None:
    """Rows of a matrix, or of a sum, difference or product of matrices worked out; None for what is no matrix."""
    if node[0] == "matrix":
        return node[1]
    if not any(part[0] == "matrix" for part in walk(node)):
        return None
    if node[0] == "neg":
        return _scaled(("num", Fraction(-1), None), matrix_rows(node[1]))
    if node[0] == "add":
        return _folded(node[1], _summed)
    if node[0] == "mul":
        return _folded(node[1], _multiplied)
    return None


def _folded(items: tuple[Node, ...], combine) -> tuple | None:
    total = matrix_rows(items[0]) or items[0]
    for item in items[1:]:
        total = combine(total, matrix_rows(item) or item)
        if total is None:
            return None
    return total if _is_rows(total) else None


def _is_rows(value: tuple) -> bool:
    return bool(value) and isinstance(value[0], tuple)


def _scaled(scalar: Node, rows: tuple | None) -> tuple | None:
    return None if rows is None else tuple(tuple(("mul", (scalar, entry)) for entry in row) for row in rows)


def _summed(a: tuple, b: tuple) -> tuple | None:
    if not (_is_rows(a) and _is_rows(b)) or [len(row) for row in a] != [len(row) for row in b]:
        return None
    return tuple(tuple(("add", pair) for pair in zip(r, s, strict=True)) for r, s in zip(a, b, strict=True))


def _multiplied(a: tuple, b: tuple) -> tuple | None:
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
