"""The functions an answer may name: exact where their argument is, else balls."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from oreal_megatron.math_equality.values import Arithmetic, TooLarge, Undefined, Value

MAX_DOUBLE_FACTORIAL = 2000
MAX_EXACT_LOGARITHM = 1000


def _smooth(name: str, slope: Callable, inverse: bool = False, largest: int = 10**9) -> Callable[..., Value]:
    """A function of mpmath whose derivative is at most slope(context, x, y); 1 / it where `inverse`."""

    def call(a: Arithmetic, *values: Value) -> Value:
        if len(values) != 1:
            raise Undefined(f"{name} takes one argument")
        if abs(a.ball(values[0]).middle) > largest:
            raise TooLarge(f"{name} of a huge number")
        result = a.smooth(getattr(a.context, name), lambda x, y: slope(a.context, x, y), values[0])
        return a.inverse(result) if inverse else result

    return call


def _wave(context, x, y):
    return 1 + abs(y) + abs(context.im(x))


def _square(context, x, y):
    return 1 + abs(y) ** 2


def _arc(context, x, y):
    """|1 - x^2|^(-1/2); at its pole the root of the rounding error bounds what the error can do."""
    distance = abs(1 - x * x)
    return 1 / context.sqrt(distance) if distance else context.mpf(2) ** (context.prec // 2)


def _logarithm(a: Arithmetic, value: Value, base: Value | None = None) -> Value:
    if value == 0 or base == 0:
        raise Undefined("the logarithm of zero")
    top = a.logarithm(value)
    if base is None:
        return top
    quotient = a.divide(top, a.logarithm(base))
    return _whole_power(a, value, base, quotient) or quotient


def _whole_power(a: Arithmetic, value: Value, base: Value, quotient: Value) -> Fraction | None:
    """The logarithm where it is a whole number, exactly: its floor and ceiling depend on it."""
    if not isinstance(value, Fraction) or not isinstance(base, Fraction) or isinstance(quotient, Fraction):
        return None
    exponent = Fraction(int(a.context.nint(a.context.re(quotient.middle))))
    return exponent if abs(exponent) <= MAX_EXACT_LOGARITHM and a.power(base, exponent) == value else None


def _tanh(a: Arithmetic, value: Value) -> Value:
    """By its exponentials, whose sizes show how near to 1 it may be."""
    square = a.exponential(a.multiply(Fraction(2), value))
    return a.divide(a.add(square, Fraction(-1)), a.add(square, Fraction(1)))


def _root(a: Arithmetic, value: Value, degree: Value) -> Value:
    odd = isinstance(degree, Fraction) and degree.denominator == 1 and degree % 2 == 1
    if odd and value != 0 and a.is_real(value) and a.sign(value) < 0:
        return a.negative(_root(a, a.negative(value), degree))
    return a.power(value, a.inverse(degree))


def _double_factorial(a: Arithmetic, value: Value) -> Value:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= MAX_DOUBLE_FACTORIAL:
        raise TooLarge(f"a double factorial of what is not a whole number up to {MAX_DOUBLE_FACTORIAL}")
    return Fraction(math.prod(range(value.numerator, 0, -2)))


def _largest(a: Arithmetic, *values: Value) -> Value:
    best = values[0]
    for value in values[1:]:
        if a.sign(a.add(value, a.negative(best))) > 0:
            best = value
    return best


def _smallest(a: Arithmetic, *values: Value) -> Value:
    return a.negative(_largest(a, *(a.negative(value) for value in values)))


def _whole(values: tuple[Value, ...]) -> list[int]:
    if not all(isinstance(value, Fraction) and value.denominator == 1 for value in values):
        raise Undefined("gcd and lcm are of whole numbers")
    return [int(value) for value in values]


FUNCTIONS: dict[str, Callable[..., Value]] = {
    "sin": _smooth("sin", _wave),
    "cos": _smooth("cos", _wave),
    "tan": _smooth("tan", _square),
    "cot": _smooth("tan", _square, inverse=True),
    "sec": _smooth("cos", _wave, inverse=True),
    "csc": _smooth("sin", _wave, inverse=True),
    "sinh": _smooth("sinh", _wave, largest=10**6),
    "cosh": _smooth("cosh", _wave, largest=10**6),
    "tanh": _tanh,
    "coth": lambda a, value: a.inverse(_tanh(a, value)),
    "arcsin": _smooth("asin", _arc),
    "arccos": _smooth("acos", _arc),
    "arctan": _smooth("atan", lambda context, x, y: 1 / abs(1 + x * x)),
    "exp": lambda a, value: a.exponential(value),
    "ln": lambda a, value: _logarithm(a, value),
    "log": _logarithm,
    "lg": lambda a, value: _logarithm(a, value, Fraction(10)),
    "sqrt": lambda a, value: a.power(value, Fraction(1, 2)),
    "root": _root,
    "abs": lambda a, value: a.absolute(value),
    "floor": lambda a, value: a.floor(value),
    "ceil": lambda a, value: -a.floor(a.negative(value)),
    "!": lambda a, value: a.factorial(value),
    "!!": _double_factorial,
    "binom": lambda a, n, k: a.binomial(n, k),
    "sgn": lambda a, value: Fraction(a.sign(value)),
    "max": _largest,
    "min": _smallest,
    "gcd": lambda a, *values: Fraction(math.gcd(*_whole(values))),
    "lcm": lambda a, *values: a.fit(Fraction(math.lcm(*_whole(values)))),
}
FUNCTIONS.update({short: FUNCTIONS["arc" + short[1:]] for short in ("asin", "acos", "atan")})
OF_ANGLES = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))


def call(name: str, arithmetic: Arithmetic, values: list[Value]) -> Value:
    """Value of a known function. Raises Undefined or TooLarge."""
    if not values:
        raise Undefined(f"{name} of nothing")
    try:
        return FUNCTIONS[name](arithmetic, *values)
    except TypeError:
        raise Undefined(f"{name} of {len(values)} arguments") from None
