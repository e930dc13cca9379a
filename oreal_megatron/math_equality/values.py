"""Arithmetic of bounded cost: exact fractions while they are small, then balls, numbers with an error bound.

A number beyond MAX_BITS is a `Ball`: middle and radius (mpmath numbers have exponents of any size, so 2^(10^9) costs
nothing), and for integers and fractions also the residue modulo two primes, which distinguishes 2^(10^9) from
2^(10^9) + 1.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

from mpmath.ctx_mp import MPContext

MpmathNumber: TypeAlias = Any  # mpf or mpc of a context; mpmath has no types
MAX_BITS = 20_000  # of numerator or denominator kept exactly
MAX_EXACT_FACTORIAL = 2000
MAX_RESIDUE_FACTORIAL = 100_000
MAX_GAMMA_BITS = 1500  # a gamma function of more digits takes seconds


def _draw_prime() -> int:
    """Draw a prime for this process alone, so that no answer can be built to have the residues of a gold."""
    while True:
        number = secrets.randbits(127) | 1 << 126 | 1
        if all(pow(base, number - 1, number) == 1 for base in (2, 3, 5)):
            return number


MODULUS = (2**127 - 1) * _draw_prime()
_FACTORIALS = [1]  # residues of 0!, 1!, 2! ... as far as they have been needed


class Undefined(ArithmeticError):
    """No value here: division by zero, a pole, a logarithm of zero."""


class NotReal(Undefined):
    """The root or logarithm of a negative number, where only real numbers count."""


class TooLarge(ArithmeticError):
    """The value cannot be held to any useful precision (a power tower, the sine of a huge number)."""


@dataclass(frozen=True, slots=True)
class Ball:
    """Some number within `radius` of `middle`, with its residue modulo MODULUS where it is rational.

    `blurred`: a term too small for the precision was added somewhere (100000! + 1).
    """

    middle: MpmathNumber  # mpf or mpc
    radius: MpmathNumber  # mpf
    residue: int | None = None
    blurred: bool = False


Value = Fraction | Ball


def _residue(value: Fraction) -> int | None:
    inverse = _inverse(value.denominator)
    return None if inverse is None else value.numerator * inverse % MODULUS


def _inverse(number: int) -> int | None:
    return pow(number, -1, MODULUS) if math.gcd(number, MODULUS) == 1 else None


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """Return the rational root of a non-negative fraction, or None."""
    if degree > 64 or max(value.numerator.bit_length(), value.denominator.bit_length()) > 2048:
        return None
    top, bottom = _integer_root(value.numerator, degree), _integer_root(value.denominator, degree)
    return None if top is None or bottom is None else Fraction(top, bottom)


def _integer_root(number: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(number)
        return root if root * root == number else None
    low, high = 0, 1 << (number.bit_length() // degree + 1)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if middle**degree < number else (low, middle)
    return low if low**degree == number else None


def _factorial_residue(a: Value) -> int | None:
    if not isinstance(a, Fraction) or a.denominator != 1 or a > MAX_RESIDUE_FACTORIAL:
        return None
    while len(_FACTORIALS) <= a:
        _FACTORIALS.append(_FACTORIALS[-1] * len(_FACTORIALS) % MODULUS)
    return _FACTORIALS[a.numerator]


class Arithmetic:
    """Operations at one precision, in bits. They raise Undefined or TooLarge where there is no value."""

    def __init__(self, bits: int) -> None:
        self.context = MPContext()
        self.context.prec = bits
        self.bits = bits
        self.error = self.context.mpf(2) ** (8 - bits)  # relative, of one operation
        self.pi = Ball(+self.context.pi, 4 * self.error)
        self.e = Ball(+self.context.e, 4 * self.error)
        self.i = Ball(self.context.mpc(0, 1), self.context.mpf(0))

    def ball(self, value: Value) -> Ball:
        """Return a value as a ball of this precision."""
        if isinstance(value, Ball):
            return value
        middle = self.context.mpf(value.numerator) / value.denominator
        return Ball(middle, abs(middle) * self.error, _residue(value))

    def fit(self, value: Fraction) -> Value:
        """Return a fraction as it is, or as a ball where it is longer than MAX_BITS."""
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        return value if bits <= MAX_BITS else self.ball(value)

    def add(self, a: Value, b: Value) -> Value:
        """Return a + b."""
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return self.fit(a + b)
        a, b = self.ball(a), self.ball(b)
        middle = a.middle + b.middle
        residue = None if a.residue is None or b.residue is None else (a.residue + b.residue) % MODULUS
        small, large = sorted((a, b), key=lambda ball: abs(ball.middle))
        blurred = a.blurred or b.blurred or 0 < abs(small.middle) < abs(large.middle) * self.error
        return Ball(middle, a.radius + b.radius + abs(middle) * self.error, residue, blurred)

    def negative(self, a: Value) -> Value:
        """Return -a."""
        if isinstance(a, Fraction):
            return -a
        return Ball(-a.middle, a.radius, None if a.residue is None else -a.residue % MODULUS, a.blurred)

    def multiply(self, a: Value, b: Value) -> Value:
        """Return a * b; zero is exact."""
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return self.fit(a * b)
        if a == 0 or b == 0:
            return Fraction(0)
        a, b = self.ball(a), self.ball(b)
        middle = a.middle * b.middle
        radius = abs(a.middle) * b.radius + abs(b.middle) * a.radius + a.radius * b.radius + abs(middle) * self.error
        residue = None if a.residue is None or b.residue is None else a.residue * b.residue % MODULUS
        return Ball(middle, radius, residue, a.blurred or b.blurred)

    def divide(self, a: Value, b: Value) -> Value:
        """Return a / b."""
        return self.multiply(a, self.inverse(b))

    def inverse(self, b: Value) -> Value:
        """Return 1 / b."""
        if isinstance(b, Fraction):
            if b == 0:
                raise Undefined("division by zero")
            return 1 / b
        size = abs(b.middle)
        if size <= 2 * b.radius:
            raise Undefined("division by a number that may be zero")
        residue = None if b.residue is None else _inverse(b.residue)
        return Ball(1 / b.middle, 2 * b.radius / size**2 + self.error / size, residue, b.blurred)

    def power(self, a: Value, b: Value) -> Value:
        """Return a^b: exactly for integer exponents and rational roots, else exp(b log a)."""
        if isinstance(b, Fraction):
            if b.denominator == 1:
                return self._integer_power(a, b.numerator)
            if isinstance(a, Fraction) and a >= 0 and (root := _exact_root(a, b.denominator)) is not None:
                return self._integer_power(root, b.numerator)
        if isinstance(a, Fraction) and a == 0:
            if self.context.re(self.ball(b).middle) > 0:
                return Fraction(0)
            raise Undefined("zero to a power that is not positive")
        return self.exponential(self.multiply(b, self.logarithm(a)))

    def _integer_power(self, a: Value, n: int) -> Value:
        if isinstance(a, Fraction):
            if a == 0 and n < 0:
                raise Undefined("division by zero")
            if a in (0, 1) or n == 0:
                return a if n else Fraction(1)
            if a == -1:
                return Fraction(-1 if n % 2 else 1)
            if abs(n) * max(a.numerator.bit_length(), a.denominator.bit_length()) <= MAX_BITS:
                return a**n
        if n < 0:
            return self.inverse(self._integer_power(a, -n))
        if n == 0:
            return Fraction(1)
        a = self.ball(a)
        relative = n * (a.radius / abs(a.middle) if a.middle else 0) + n * self.error
        if n.bit_length() > 64 or relative > 2**-20:
            raise TooLarge(f"a power with an exponent of {n.bit_length()} bits")
        middle = a.middle**n
        residue = None if a.residue is None else pow(a.residue, n, MODULUS)
        return Ball(middle, abs(middle) * 2 * relative, residue, a.blurred)

    def exponential(self, a: Value) -> Value:
        """Return e^a."""
        if a == 0:
            return Fraction(1)
        a = self.ball(a)
        if abs(a.middle) > 10**20 or a.radius > 2**-20:
            raise TooLarge("the exponential of a huge number")
        middle = self.context.exp(a.middle)
        return Ball(middle, abs(middle) * (2 * a.radius + self.error), None, a.blurred)

    def logarithm(self, a: Value) -> Value:
        """Return the natural logarithm of a."""
        if a == 1:
            return Fraction(0)
        a = self.ball(a)
        size = abs(a.middle)
        if size <= 2 * a.radius:
            raise Undefined("the logarithm of a number that may be zero")
        middle = self.context.log(a.middle)
        return Ball(middle, 2 * a.radius / size + (abs(middle) + 1) * self.error, None, a.blurred)

    def smooth(
        self,
        function: Callable[[MpmathNumber], MpmathNumber],
        slope: Callable[[MpmathNumber, MpmathNumber], MpmathNumber],
        a: Value,
    ) -> Ball:
        """Return function(a) of mpmath numbers; slope(x, function(x)) bounds the derivative, so also the error."""
        a = self.ball(a)
        if abs(a.middle) > 10**9:
            raise TooLarge("a function of a huge number")
        try:
            middle = function(a.middle)
            steep = abs(slope(a.middle, middle))
        except (ValueError, ZeroDivisionError):
            raise Undefined("a pole") from None
        radius = 2 * steep * a.radius + (abs(middle) + steep * abs(a.middle)) * self.error
        if radius > abs(middle) + 1:
            raise Undefined("too close to a pole")
        return Ball(middle, radius, None, a.blurred)

    def factorial(self, a: Value) -> Value:
        """Return a!, which is gamma(a + 1) where a is not an integer."""
        if isinstance(a, Fraction) and a.denominator == 1:
            n = a.numerator
            if n < 0:
                raise Undefined("the factorial of a negative number")
            if n <= MAX_EXACT_FACTORIAL:
                return Fraction(math.factorial(n))
        ball = self.ball(a)
        size = abs(ball.middle)
        if size > 10**15 or ball.radius > 2**-20 or self.bits > MAX_GAMMA_BITS:
            raise TooLarge("the factorial of a huge number")
        try:
            middle = self.context.gamma(ball.middle + 1)
        except ValueError:
            raise Undefined("a pole") from None
        relative = (ball.radius + size * self.error) * (self.context.log(size + 2) * 4 + 16) + self.error
        return Ball(middle, abs(middle) * relative, _factorial_residue(a), ball.blurred)

    def binomial(self, n: Value, k: Value) -> Value:
        """Return n! / (k! (n - k)!); 0 for integers k outside 0 .. n."""
        if isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1 and n >= 0:
            if k < 0 or k > n:
                return Fraction(0)
            if min(k, n - k) * max(n.numerator.bit_length(), 1) <= 4 * MAX_BITS:
                return self.fit(Fraction(math.comb(n.numerator, k.numerator)))
        bottom = self.multiply(self.factorial(k), self.factorial(self.add(n, self.negative(k))))
        return self.divide(self.factorial(n), bottom)

    def floor(self, a: Value) -> Fraction:
        """Return the largest integer that is not above a. Undefined where the ball holds an integer."""
        if isinstance(a, Fraction):
            return Fraction(math.floor(a))
        if abs(a.middle) > 10**100 or not self.is_real(a):
            raise TooLarge("the floor of a huge or complex number")
        real = self.context.re(a.middle)
        low, high = self.context.floor(real - a.radius), self.context.floor(real + a.radius)
        if low != high:
            raise Undefined("a floor at the edge of an integer")
        return Fraction(int(low))

    def absolute(self, a: Value) -> Value:
        """Return |a|."""
        if isinstance(a, Fraction):
            return abs(a)
        residue = a.residue if self.is_real(a) and self.context.re(a.middle) > 0 else None
        return Ball(abs(a.middle), a.radius, residue, a.blurred)

    def is_real(self, a: Value) -> bool:
        """Return whether the imaginary part is zero within the error."""
        return isinstance(a, Fraction) or bool(abs(self.context.im(a.middle)) <= a.radius)

    def sign(self, a: Value) -> int:
        """Return -1, 0 or 1 for a real value. Undefined where the ball holds zero and other numbers."""
        if isinstance(a, Fraction):
            return (a > 0) - (a < 0)
        if not self.is_real(a) or abs(a.middle) <= a.radius:
            raise Undefined("the sign of a number that may be zero")
        return 1 if self.context.re(a.middle) > 0 else -1

    def extent(self, value: Value) -> int:
        """Return the length in bits of a fraction, or the size of a ball's exponent."""
        if isinstance(value, Fraction):
            return max(value.numerator.bit_length(), value.denominator.bit_length())
        return abs(int(self.context.mag(value.middle))) if value.middle else 0

    def equal(self, a: Value, b: Value) -> bool:
        """Return whether two values are certainly the same number; values too close to distinguish are not equal."""
        return self.same(a, b) is True

    def same(self, a: Value, b: Value) -> bool | None:
        """Compare two values: exactly for fractions; balls that overlap without enough precision give None."""
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a == b
        a, b = self.ball(a), self.ball(b)
        radius = a.radius + b.radius
        if abs(a.middle - b.middle) > radius:
            return False
        if a.residue is not None and b.residue is not None:
            return a.residue == b.residue
        scale = max(abs(a.middle), abs(b.middle), 1)
        narrow = radius <= scale * self.context.mpf(2) ** (-self.bits // 3)
        return True if narrow and not (a.blurred or b.blurred) else None


class RealArithmetic(Arithmetic):
    """Operations of real numbers: NotReal where there is no real value, as sqrt(x) sqrt(y) = sqrt(xy) needs."""

    def power(self, a: Value, b: Value) -> Value:
        """Return a^b; odd roots of negative numbers are real: (-8)^(1/3) = -2."""
        odd = isinstance(b, Fraction) and b.denominator % 2 == 1 and b.denominator > 1
        if isinstance(b, Fraction) and odd and a != 0 and self.is_real(a) and self.sign(a) < 0:
            root = self.power(self.negative(a), b)
            return self.negative(root) if b.numerator % 2 else root
        return super().power(a, b)

    def logarithm(self, a: Value) -> Value:
        """Return the natural logarithm of a number that is not negative."""
        if self.is_real(a) and self.sign(a) < 0:
            raise NotReal("the logarithm or a root of a negative number")
        return super().logarithm(a)
