"""Tree -> value at a point.

Variables take their values from the point by name; so does everything else that has no arithmetic here.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from oreal_megatron.math_equality.functions import FUNCTIONS, OF_ANGLES, call
from oreal_megatron.math_equality.sample_points import Point
from oreal_megatron.math_equality.tree import Node, key, walk
from oreal_megatron.math_equality.values import Arithmetic, TooLarge, Undefined, Value

MAX_TERMS = 300  # of a sum or product that is computed; longer ones are compared as written
MAX_WORK = 6_000  # nodes visited for one value: the bound of nested sums
FUNCTION_WORK = 8  # nodes that a function without an exact value counts for, at 600 bits


def is_opaque(node: Node) -> bool:
    """Return whether a function or subscripted letter has no arithmetic: it is a variable with a long name."""
    return bool(node[0] == "fn" and node[1] not in FUNCTIONS and node[1] not in ("sum", "prod"))


def has_variables(node: Node) -> bool:
    """Return whether a tree holds a letter, or a node that stands for one."""
    return any(part[0] == "atom" or is_opaque(part) for part in walk(node))


class Evaluator:
    """Values of trees at one point and one precision."""

    def __init__(self, arithmetic: Arithmetic, at: Point, limit: int = MAX_WORK) -> None:
        self.arithmetic, self.at, self.angle = arithmetic, at, False
        self.work, self.limit, self.extent = 0, min(limit, MAX_WORK), 0
        self.price = FUNCTION_WORK * max(1, arithmetic.bits // 600) ** 2
        self.bound: dict[str, Fraction] = {}  # running variables of sums and products

    def value(self, node: Node) -> Value:
        """Return the value of a tree; `extent` becomes the largest of all values on the way.

        Raises Undefined or TooLarge.
        """
        kind = node[0]
        self.work += 1
        if self.work > self.limit:
            raise TooLarge(f"more than {self.limit} steps")
        if kind == "atom":
            return self.bound[node[1]] if node[1] in self.bound else self.at(node[1])
        handler: Callable[..., Value] | None = getattr(self, f"_{kind}", None)
        if handler is None:
            raise Undefined(f"{kind} has no value")
        value = handler(*node[1:])
        if kind in ("fn", "pow") and not isinstance(value, Fraction):
            self.work += self.price
        self.extent = max(self.extent, self.arithmetic.extent(value))
        return value

    def _num(self, value: Fraction, _: int | None) -> Value:
        return value

    def _const(self, name: str) -> Value:
        if name not in ("pi", "e", "i"):
            raise Undefined(f"{name} is not a number")
        if name in self.bound:
            return self.bound[name]
        value: Value = getattr(self.arithmetic, name)
        return value

    def _add(self, items: tuple[Node, ...]) -> Value:
        total = self.value(items[0])
        for item in items[1:]:
            total = self.arithmetic.add(total, self.value(item))
        return total

    def _mul(self, items: tuple[Node, ...]) -> Value:
        total = self.value(items[0])
        for item in items[1:]:
            total = self.arithmetic.multiply(total, self.value(item))
        return total

    def _div(self, top: Node, bottom: Node) -> Value:
        return self.arithmetic.divide(self.value(top), self.value(bottom))

    def _neg(self, node: Node) -> Value:
        return self.arithmetic.negative(self.value(node))

    def _pow(self, base: Node, exponent: Node) -> Value:
        power = self.value(exponent)
        if base == ("const", "e") and "e" not in self.bound:
            return self.arithmetic.exponential(power)
        return self.arithmetic.power(self.value(base), power)

    def _deg(self, node: Node) -> Value:
        degrees = self.value(node)
        if not self.angle:
            return degrees
        return self.arithmetic.multiply(self.arithmetic.divide(degrees, Fraction(180)), self.arithmetic.pi)

    def _pct(self, node: Node) -> Value:
        return self.arithmetic.divide(self.value(node), Fraction(100))

    def _base(self, digits: str, base: int) -> Value:
        if not 2 <= base <= 36 or len(digits) > 1000 or not digits.isdigit() or max(map(int, digits)) >= base:
            raise Undefined("a digit that the base does not have")
        return Fraction(int(digits, base))

    def _ratio(self, items: tuple[Node, ...]) -> Value:
        if len(items) != 2:
            raise Undefined("a ratio of more than two is not a number")
        return self._div(*items)

    def _fn(self, name: str, args: tuple[Node, ...]) -> Value:
        if name in ("sum", "prod"):
            return self._sum_or_product(name, *args)
        if name not in FUNCTIONS:
            return self.at(key(("fn", name, args)))
        outer, self.angle = self.angle, name in OF_ANGLES
        values = [self.value(arg) for arg in args]
        self.angle = outer
        return call(name, self.arithmetic, values)

    def _sum_or_product(self, name: str, body: Node, low: Node, high: Node) -> Value:
        """Compute a sum or product between integer bounds term by term; others are variables with a long name."""
        bounds = self._bounds(low, high)
        if bounds is None or any(is_opaque(part) for part in walk(body)):
            return self.at(key(("fn", name, (body, low, high))))
        variable, first, last = bounds
        total: Value = Fraction(name == "prod")
        outer = self.bound
        combine = self.arithmetic.add if name == "sum" else self.arithmetic.multiply
        for k in range(first, last + 1):
            self.bound = {**outer, variable: Fraction(k)}
            total = combine(total, self.value(body))
        self.bound = outer
        return total

    def _bounds(self, low: Node, high: Node) -> tuple[str, int, int] | None:
        r"""Return (k, 1, 10) for \sum_{k=1}^{10}; None where the bounds are not integers, or too far apart."""
        if low[0] != "rel" or low[2] != ("=",) or low[1][0][0] not in ("atom", "const") or high[0] == "word":
            return None
        try:
            first, last = self.value(low[1][1]), self.value(high)
        except Undefined:
            return None
        if not (
            isinstance(first, Fraction) and isinstance(last, Fraction) and first.denominator == last.denominator == 1
        ):
            return None
        return (low[1][0][1], int(first), int(last)) if last - first <= MAX_TERMS else None
