"""Names in front of answers: x = 5, f(t) = t + 1, AB = 4, Area = 540. A value belongs to its name."""

from __future__ import annotations

from oreal_megatron.math_equality import units
from oreal_megatron.math_equality.evaluator import has_variables, is_opaque
from oreal_megatron.math_equality.tree import Node, key, rename_letters, walk

_INTEGERS = (("const", "set Z"), ("atom", "Z"))


def _is_name(node: Node, depth: int = 0) -> bool:
    """Return whether a node may be named by a gold: x, a_n, f(x), sin x, AB, |AB|, angle ABC, A:B, dy/dx, (p, q)."""
    kind = node[0]
    if depth > 3:
        return False
    if kind == "fn":
        return node[1] not in ("sqrt", "!", "sum", "int", "floor", "ceil", "binom")
    if kind in ("mul", "ratio"):
        return all(_is_name(item, depth + 1) for item in node[1])
    if kind == "tuple":
        return node[1:3] == ("(", ")") and all(_is_name(item, depth + 1) for item in node[3])
    if kind == "div":
        return _is_name(node[1], depth + 1) and _is_name(node[2], depth + 1)
    return kind in ("atom", "word") or kind == "const" and node[1] in ("e", "i")


def is_plain_name(node: Node) -> bool:
    """Return whether a name may precede a value that the gold gives without one: x, a_n, f(x), AB, |AB|, NO/BO.

    Not sin x, |x| or xy: 5 is not the answer where xy = 5.
    """
    kind = node[0]
    if kind == "fn" and node[1] == "abs":
        return bool(node[2][0][0] == "mul" and is_plain_name(node[2][0]))
    if kind in ("mul", "ratio", "div"):
        parts = node[1] if kind != "div" else node[1:]
        return all(map(_is_name, parts)) and any(_is_figure(part) for part in walk(parts))
    if kind == "tuple":
        return all(map(is_plain_name, node[3]))
    return kind == "word" and not units.denies(node[1]) or kind == "atom" or is_opaque(node)


def _is_figure(node: Node) -> bool:
    """Return whether a letter is a point of a figure, or the sign of an angle or triangle."""
    return node[0] == "atom" and (len(node[1]) == 1 and node[1].isupper() or node[1] in ("\\angle", "\\triangle"))


def named(node: Node) -> tuple[Node | None, tuple[Node, ...]]:
    """Return (name, values) of "x = 1 + 1 = 2", "x in S", "x = 1/3 ~ 0.33"; the last value is the answer.

    The name is None in "2 + 4 = 6" and for nodes that are no assignment.
    """
    if node[0] != "rel":
        return None, (node,)
    items, ops = node[1], node[2]
    if ops == ("in",) and _is_name(items[0]):
        return items[0], items[1:]
    if not set(ops) <= {"=", "~"}:
        return None, (node,)
    items = items[: len(items) if "~" not in ops else max(ops.index("~") + 1, 2)]
    if _is_name(items[0]):
        return items[0], items[1:]
    if len(items) == 2 and items[1][0] == "atom" and not has_variables(items[0]):
        return items[1], items[:1]
    if len(items) > 2 and _is_name(items[-2]):
        return items[-2], items[:-2] + items[-1:]
    return (None, (node,)) if any(map(has_variables, items)) else (None, items)


def same_name(gold: Node, name: Node) -> bool:
    """Return whether two names are the same; a name in words ("Area") may stand for any other."""
    return (
        key(gold).lower() == key(name).lower()
        if gold[0] == name[0] == "word"
        else (key(gold) == key(name) or "word" in (gold[0], name[0]))
    )


def renaming(gold: Node, name: Node) -> dict[str, str]:
    """Map the letters in the arguments of `name` to those of `gold`, the same function: f(t) -> f(x)."""
    if gold[:2] != name[:2] or not is_opaque(gold) or len(gold[2]) != len(name[2]) or gold[1] in ("_", "'"):
        return {}
    letters, others = ([arg[1] for arg in side[2] if arg[0] == "atom"] for side in (gold, name))
    if not len(set(letters)) == len(set(others)) == len(gold[2]):
        return {}
    return dict(zip(others, letters, strict=True))


def unindexed(node: Node) -> Node:
    """Return the assignment without the index of its unknown: x_1 = 2 -> x = 2."""
    if node[0] != "rel" or node[1][0][:2] != ("fn", "_"):
        return node
    return ("rel", (node[1][0][2][0], *node[1][1:]), node[2])


def assignments(items: tuple[Node, ...]) -> bool:
    """Return whether every item has its own unknown: AB = 4, CD = 5. The roots x_1 = 2, x_2 = 3 share one."""
    names = [named(unindexed(item))[0] for item in items]
    return len(items) > 1 and None not in names and len(set(names)) == len(items)


def split_approximation(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """Split "sqrt(5) ~ 2.236" into the exact answer and the approximations behind it; x ~ 3 has none."""
    if node[0] != "rel" or "~" not in node[2] or not set(node[2]) <= {"=", "~"}:
        return node, ()
    items, ops = node[1], node[2]
    at = ops.index("~") + 1
    if at == 1 and has_variables(items[0]) and _is_name(items[0]):
        return node, ()
    return (items[0] if at == 1 else ("rel", items[:at], ops[: at - 1])), items[at:]


def without_parameter(gold: Node, predicted: Node) -> tuple[Node, Node] | None:
    """Return both answers without "k in Z" where one side leaves it out, or names the integer by another letter.

    None where neither side has such a parameter.
    """
    (g, letter), (p, other) = _parameter(gold), _parameter(predicted)
    if not letter and not other:
        return None
    if letter and other and letter != other:
        if any(part == ("atom", letter) for part in walk(p)):
            return None
        p = rename_letters(p, {other: letter})
    return g, p


def _parameter(node: Node) -> tuple[Node, str]:
    """Return an answer without its last item "k in Z", and k; an answer without such an item has no letter."""
    if node[0] != "list" or len(node[1]) < 2 or node[2:]:
        return node, ""
    *items, last = node[1]
    if last[0] != "rel" or last[2] != ("in",) or last[1][0][0] != "atom" or last[1][1] not in _INTEGERS:
        return node, ""
    letter = last[1][0][1]
    if not any(part == ("atom", letter) for item in items for part in walk(item)):
        return node, ""
    return (items[0] if len(items) == 1 else ("list", tuple(items))), letter
