"""The tree of an answer: plain tuples whose first item names the kind. Nothing is computed here.

Kinds and their fields, in the order they stand in the tuple (a, b, low ... are nodes; items is a tuple of nodes):

num value places | atom name | const name | add items | mul items | div a b | neg a | pow a b | fn name args | deg a |
pct a | pm sign a | tuple open close items | set items | such variable condition | union items | minus a b | meet a b |
rel items ops | list items [how] | matrix rows | unit a words | base digits base | ratio items | word text
A list's [how]: "and" or "or" between inequalities, "signs" of a plus-minus.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, TypeAlias

from oreal_megatron.math_equality.lexer import ParseError

Node: TypeAlias = tuple[Any, ...]  # the fields depend on the kind: see above
MAX_EXPONENT = 200  # of a number written 1e200; beyond it the number is a power that is not built
DOUBLE_DIGITS = 15  # behind the point of a double as programs print it: 3.3333333333333335e-05
MAX_TREE_DEPTH = 120  # well inside Python's own recursion limit
BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
         "eleven": 11, "twelve": 12, "sixteen": 16}  # fmt: skip
_DIFFERENCES = (("atom", "d"), ("atom", "\\partial"), ("atom", "\\Delta"), ("atom", "\\delta"))
_NAMED = ("atom", "const", "word")


def number(text: str) -> Node:
    """Return the node of a number as it is written: 12, 0.50 (two decimal places), 6.02e23."""
    mantissa, _, exponent = text.lower().partition("e")
    value = Fraction(mantissa.rstrip(".") or "0")
    if not exponent:
        return ("num", value, len(mantissa.partition(".")[2]) or None)
    if abs(int(exponent)) > MAX_EXPONENT:
        return ("mul", (("num", value, None), ("pow", ("num", Fraction(10), None), ("num", Fraction(exponent), None))))
    digits = mantissa.partition(".")[2]
    places = len(digits) - int(exponent) if len(digits) >= DOUBLE_DIGITS else None
    return ("num", value * Fraction(10) ** int(exponent), places if places and places > 0 else None)


def repeating(text: str) -> Node:
    """Return the node of a repeating decimal: "0.1|6", 0.1666..., is 1/6."""
    head, cycle = text.split("|")
    places = len(head.partition(".")[2])
    tail = Fraction(int(cycle), 10**places * (10 ** len(cycle) - 1))
    return ("num", Fraction(head.rstrip(".") or "0") + tail, None)


def grouped(items: list[Node], separators: list[str]) -> Node:
    """Return a list node. With both signs present, semicolons separate groups of commas: p=5,q=2; p=7,q=2."""
    if set(separators) in ({"and"}, {"or"}) and all(item[0] == "rel" for item in items):
        inequality = any(set(item[2]) - {"=", "in"} for item in items)
        return ("list", tuple(items), separators[0]) if inequality else ("list", tuple(items))
    outer = next((s for s in (";", "and", "or") if s in separators and "," in separators), None)
    if outer is None or outer != ";" and not all(item[0] == "rel" for item in items):
        return ("list", tuple(items))
    groups: list[list[Node]] = [[items[0]]]
    for separator, item in zip(separators, items[1:], strict=True):
        if separator == outer:
            groups.append([])
        groups[-1].append(item)
    if len({len(group) for group in groups}) != 1 or len(groups[0]) == 1:
        return ("list", tuple(items))
    return ("list", tuple(("list", tuple(group)) for group in groups))


def bracket(opening: str, closing: str, inside: Node | None) -> Node:
    """Return the node of a pair of brackets: a group, tuple, interval, set, floor or ceiling."""
    if opening in ("floor", "ceil"):
        if closing != opening or inside is None:
            raise ParseError("a floor or ceiling is not closed")
        return ("fn", opening, (inside,))
    partner = "{" if closing == "}" else closing
    if any((opening == kind) != (partner == kind) for kind in ("{", "set", "<")):
        raise ParseError(f"{opening!r} is closed by {closing!r}")
    items = () if inside is None else inside[1] if inside[0] == "list" else (inside,)
    if opening == "set":
        return ("set", items) if items else ("const", "empty")
    if opening == "{":
        return ("const", "empty") if inside is None else inside
    if opening == "<":
        return ("tuple", "(", ")", items)
    if inside is not None and (inside[0] == "matrix" or (opening, closing) == ("(", ")") and inside[0] != "list"):
        return inside
    return ("tuple", opening, closing, items)


def mixed(factors: list[Node], part: Node) -> Node:
    r"""Return `part` as a mixed number with the integer before it: 2\frac{1}{3}, also 2\frac{1}{3}\%.

    The integer is removed from `factors`. Return `part` unchanged where the two are a product.
    """
    if part[0] in ("pct", "deg"):
        inner = mixed(factors, part[1])
        return part if inner is part[1] else (part[0], inner)
    integer = factors[-1]
    if integer[0] != "num" or integer[2] is not None or integer[1].denominator != 1 or part[0] != "div":
        return part
    top, bottom = part[1], part[2]
    plain = top[0] == bottom[0] == "num" and top[2] is None and bottom[2] is None
    return ("add", (factors.pop(), part)) if plain and 0 < top[1] < bottom[1] else part


def subscript(node: Node, index: Node) -> Node:
    """Return a node with its index: x_1 is a variable of its own; 204_5 is a numeral in base 5."""
    if node[0] != "num":
        if index[0] == "mul" and all(part[0] in ("atom", "const") for part in index[1]):  # a_{ij} is not a_{ji}
            index = ("word", "".join(part[1] for part in index[1]))
        return ("fn", "_", (node, index))
    if index[0] == "word" and index[1].lower() in BASES:
        return ("base", str(node[1]), BASES[index[1].lower()])
    if index[0] != "num" or index[1].denominator != 1:
        raise ParseError("the subscript of a number is not a base")
    return ("base", str(node[1]), int(index[1]))


def times(a: Node, b: Node) -> Node:
    """Return one product of the factors of both, so that long products stay flat."""
    return ("mul", (a[1] if a[0] == "mul" else (a,)) + (b[1] if b[0] == "mul" else (b,)))


def cross(a: Node, b: Node) -> Node:
    """Return a vector product. Its operands have one order, so that a x b is -(b x a)."""
    return ("fn", "cross", (a, b)) if key(a) <= key(b) else ("neg", ("fn", "cross", (b, a)))


def remainder(a: Node, b: Node) -> Node:
    """Return a mod b, a number."""
    return ("fn", "mod", (a, b))


def quotient(top: Node, bottom: Node) -> Node:
    r"""Return a fraction, or a derivative, in which d is no letter: \frac{dy}{dx}, \frac{d^2}{dx^2}, 2 dy/dx."""
    factors = top[1] if top[0] == "mul" else (top,)
    start = next((i for i, factor in enumerate(factors) if _is_d(factor)), None)
    below: tuple[Node, ...] = bottom[1] if bottom[0] == "mul" else ()
    if start is None or len(below) < 2 or not _is_d(below[0]) or below[0][0] != "atom":
        return ("div", top, bottom)
    derivative: Node = ("fn", "derivative", (("tuple", "(", ")", factors[start:]), ("tuple", "(", ")", below)))
    return derivative if start == 0 else ("mul", (*factors[:start], derivative))


def _is_d(node: Node) -> bool:
    """Return whether a node is d or its power: d, d^2, and the same of partial derivatives."""
    return node in _DIFFERENCES or node[0] == "pow" and _is_d(node[1])


def length(node: Node) -> Node:
    """Return what |AB| holds where the bars hold a vector from A to B: the length has no direction."""
    if node[:2] != ("fn", "vec") or len(node[2][0][1]) != 2:
        return node
    return ("mul", tuple(("atom", point) for point in node[2][0][1]))


def depth(node: Node) -> int:
    """Count the levels of a tree, without recursion."""
    levels, row = 0, [node]
    while row:
        levels += 1
        row = [part for item in row for part in item if isinstance(part, tuple)]
    return levels


def walk(node: Node) -> Iterator[Node]:
    """Yield every node of a tree."""
    stack = [node]
    while stack:
        item = stack.pop()
        if item and isinstance(item[0], str):
            yield item
        stack.extend(part for part in item if isinstance(part, tuple))


def rename_letters(node: Node, names: dict[str, str]) -> Node:
    """Return the tree with other letters."""
    if node[:1] == ("atom",):
        return ("atom", names.get(node[1], node[1]))
    return tuple(rename_letters(part, names) if isinstance(part, tuple) else part for part in node)


def key(node: Node) -> str:
    """Return one string for trees that differ only in the order of their sums and products."""
    if node[0] == "num":
        return str(node[1])
    if node[0] in _NAMED:
        return str(node[1])
    if node[0] in ("add", "mul", "union"):
        return f"{node[0]}({';'.join(sorted(_flat_keys(node)))})"
    if node[0] == "set":  # a set of sets is not the set of their elements
        return f"set({';'.join(sorted(map(key, node[1])))})"
    return f"{node[0]}({';'.join(_key_of_field(part) for part in node[1:])})"


def _key_of_field(part: object) -> str:
    if not isinstance(part, tuple):
        return str(part)
    if part and isinstance(part[0], str) and (part[0] in _NAMED or not all(isinstance(item, str) for item in part)):
        return key(part)
    return f"[{','.join(map(_key_of_field, part))}]"


def _flat_keys(node: Node) -> Iterator[str]:
    for item in node[1]:
        if item[0] == node[0]:
            yield from _flat_keys(item)
        elif node[0] == "add" and item[0] == "neg" and item[1][0] == "add":
            yield from (key(("neg", inner)) for inner in item[1][1])
        else:
            yield key(item)
