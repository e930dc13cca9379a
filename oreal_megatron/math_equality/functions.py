"""Functions that an answer may name: exact where they have an exact value, else balls."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeAlias

from oreal_megatron.math_equality.values import Arithmetic, TooLarge, Undefined, Value

MAX_DOUBLE_FACTORIAL = 2000
MAX_EXACT_LOGARITHM = 1000
Function: TypeAlias = Callable[..., Value]  # (arithmetic, *arguments) -> value
Slope: TypeAlias = Callable[[Any, Any, Any], Any]  # (mpmath context, x, y = f(x)) -> bound of |f'(x)|


def _smooth(name: str, slope: Slope, inverse: bool = False, largest: int = 10**9) -> Function:
    """Return a function of mpmath with a bound of its derivative, or 1 / the function where `inverse`."""

    def call(a: Arithmetic, *values: Value) -> Value:
        if len(values) != 1:
            raise Undefined(f"{name} takes one argument")
        if abs(a.ball(values[0]).middle) > largest:
            raise TooLarge(f"{name} of a huge number")
        result = a.smooth(getattr(a.context, name), lambda x, y: slope(a.context, x, y), values[0])
        return a.inverse(result) if inverse else result

    return call


def _slope_of_wave(context: Any, x: Any, y: Any) -> Any:
    return 1 + abs(y) + abs(context.im(x))


def _slope_of_tangent(context: Any, x: Any, y: Any) -> Any:
    return 1 + abs(y) ** 2


def _slope_of_arc(context: Any, x: Any, y: Any) -> Any:
    """Return |1 - x^2|^(-1/2). At its pole the inverse root of the rounding error bounds the slope that matters."""
    distance = abs(1 - x * x)
    return 1 / context.sqrt(distance) if distance else context.mpf(2) ** (context.prec // 2)


def _logarithm(a: Arithmetic, value: Value, base: Value | None = None) -> Value:
    if value == 0 or base == 0:
        raise Undefined("the logarithm of zero")
    top = a.logarithm(value)
    if base is None:
        return top
    quotient = a.divide(top, a.logarithm(base))
    return _integer_logarithm(a, value, base, quotient) or quotient


def _integer_logarithm(a: Arithmetic, value: Value, base: Value, quotient: Value) -> Fraction | None:
    """Return the logarithm exactly where it is an integer: its floor and ceiling depend on it."""
    if not isinstance(value, Fraction) or not isinstance(base, Fraction) or isinstance(quotient, Fraction):
        return None
    exponent = Fraction(int(a.context.nint(a.context.re(quotient.middle))))
    return exponent if abs(exponent) <= MAX_EXACT_LOGARITHM and a.power(base, exponent) == value else None


def _tanh(a: Arithmetic, value: Value) -> Value:
    """Return tanh from exponentials, whose sizes keep the distance to 1."""
    square = a.exponential(a.multiply(Fraction(2), value))
    return a.divide(a.add(square, Fraction(-1)), a.add(square, Fraction(1)))


def _root(a: Arithmetic, value: Value, degree: Value) -> Value:
    odd = isinstance(degree, Fraction) and degree.denominator == 1 and degree % 2 == 1
    if odd and value != 0 and a.is_real(value) and a.sign(value) < 0:
        return a.negative(_root(a, a.negative(value), degree))
    return a.power(value, a.inverse(degree))


def _double_factorial(a: Arithmetic, value: Value) -> Value:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= MAX_DOUBLE_FACTORIAL:
        raise TooLarge(f"a double factorial of anything but an integer up to {MAX_DOUBLE_FACTORIAL}")
    return Fraction(math.prod(range(value.numerator, 0, -2)))


def _largest(a: Arithmetic, *values: Value) -> Value:
    best = values[0]
    for value in values[1:]:
        if a.sign(a.add(value, a.negative(best))) > 0:
            best = value
    return best


def _smallest(a: Arithmetic, *values: Value) -> Value:
    return a.negative(_largest(a, *(a.negative(value) for value in values)))


def _remainder(a: Arithmetic, value: Value, modulus: Value) -> Value:
    """Return value - modulus * floor(value / modulus)."""
    quotient = a.floor(a.divide(value, modulus))
    return a.add(value, a.negative(a.multiply(modulus, quotient)))


def _integers(values: tuple[Value, ...]) -> list[int]:
    integers = [int(value) for value in values if isinstance(value, Fraction) and value.denominator == 1]
    if len(integers) < len(values):
        raise Undefined("gcd or lcm of a number that is not an integer")
    return integers


FUNCTIONS: dict[str, Function] = {
    "sin": _smooth("sin", _slope_of_wave),
    "cos": _smooth("cos", _slope_of_wave),
    "tan": _smooth("tan", _slope_of_tangent),
    "cot": _smooth("tan", _slope_of_tangent, inverse=True),
    "sec": _smooth("cos", _slope_of_wave, inverse=True),
    "csc": _smooth("sin", _slope_of_wave, inverse=True),
    "sinh": _smooth("sinh", _slope_of_wave, largest=10**6),
    "cosh": _smooth("cosh", _slope_of_wave, largest=10**6),
    "tanh": _tanh,
    "coth": lambda a, value: a.inverse(_tanh(a, value)),
    "arcsin": _smooth("asin", _slope_of_arc),
    "arccos": _smooth("acos", _slope_of_arc),
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
    "mod": _remainder,
    "max": _largest,
    "min": _smallest,
    "gcd": lambda a, *values: Fraction(math.gcd(*_integers(values))),
    "lcm": lambda a, *values: a.fit(Fraction(math.lcm(*_integers(values)))),
}
FUNCTIONS.update({short: FUNCTIONS["arc" + short[1:]] for short in ("asin", "acos", "atan")})
OF_ANGLES = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))


def call(name: str, arithmetic: Arithmetic, values: list[Value]) -> Value:
    """Return the value of a known function. Raises Undefined or TooLarge."""
    if not values:
        raise Undefined(f"{name} without an argument")
    try:
        return FUNCTIONS[name](arithmetic, *values)
    except TypeError:
        raise Undefined(f"{name} of {len(values)} arguments") from None
