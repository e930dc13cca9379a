"""The arithmetic against exact fractions and mpmath at a much higher precision."""

from fractions import Fraction

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oreal_megatron.math_equality import values
from oreal_megatron.math_equality.evaluator import Evaluator
from oreal_megatron.math_equality.normalise import normalise
from oreal_megatron.math_equality.parser import parse
from oreal_megatron.math_equality.values import Arithmetic, Ball, TooLarge, Undefined

SMALL = Arithmetic(64)
FRACTIONS = st.fractions(min_value=-50, max_value=50, max_denominator=50)
FORMULAS = [
    "\\sqrt{2}", "e^{\\pi}", "\\pi^{e}", "\\sin 1", "\\cos\\frac{\\pi}{7}", "\\tan 1.5", "\\ln 10", "\\log_2 10",
    "\\arcsin\\frac{1}{3}", "\\arccos 0.999999999", "\\arctan 7", "\\sinh 3", "\\cosh 3", "\\tanh 0.1", "\\sqrt[5]{7}",
    "(\\frac{7}{2})!", "\\cot 2", "\\sec 1", "\\csc 3", "2^{\\sqrt{3}}", "(1+\\frac{1}{1000000})^{1000000}",
    "\\sin(10^{8})", "\\sqrt{10^{12}+1}-10^{6}", "e^{-50}", "\\frac{1}{\\sqrt{2}-\\sqrt{1.9999999}}", "5001!",
    "\\sin 3.14159265",
]  # fmt: skip


def value(arithmetic, text):
    return Evaluator(arithmetic, lambda name: Fraction(1)).value(parse(normalise(text)))


@pytest.mark.parametrize("formula", FORMULAS)
def test_the_true_value_lies_in_the_ball(formula):
    """Oracle: the same formula with 20 times the digits."""
    rough, true = SMALL.ball(value(SMALL, formula)), value(Arithmetic(1300), formula)
    with mpmath.workprec(1300):
        true = mpmath.mpmathify(Arithmetic(1300).ball(true).middle)
        distance = abs(mpmath.mpmathify(rough.middle) - true)
        assert distance <= mpmath.mpmathify(rough.radius)
        assert mpmath.mpmathify(rough.radius) < abs(true) * mpmath.mpf(10) ** -2


@given(FRACTIONS, FRACTIONS)
def test_balls_follow_exact_arithmetic(a, b):
    ball_a, ball_b = SMALL.ball(a), SMALL.ball(b)
    for name in ("add", "multiply", "divide"):
        if name == "divide" and b == 0:
            continue
        exact, ball = getattr(SMALL, name)(a, b), getattr(SMALL, name)(ball_a, ball_b)
        assert SMALL.equal(exact, ball) and not SMALL.equal(exact + 1, ball)


def test_huge_numbers_are_compared_without_building_them():
    two, four = Fraction(2), Fraction(4)
    million = SMALL.power(two, Fraction(10**9))
    assert isinstance(million, Ball)
    assert SMALL.equal(million, SMALL.power(four, Fraction(10**9 // 2)))
    assert not SMALL.equal(million, SMALL.add(million, Fraction(1)))


def test_a_term_lost_in_a_huge_sum_is_not_taken_for_nothing():
    fine = Arithmetic(160)
    huge = fine.factorial(Fraction(10**6))
    assert not fine.equal(huge, fine.add(huge, Fraction(1)))
    assert fine.equal(huge, fine.multiply(Fraction(10**6), fine.factorial(Fraction(10**6 - 1))))


@pytest.mark.parametrize(
    "formula", ["9^{9^{9^9}}", "10^{10^{10^{10}}}", "\\sin(10^{100})", "e^{e^{e^{e^e}}}", "(10^{99})!"]
)
def test_what_cannot_be_held_is_said_to_be_too_large(formula):
    with pytest.raises(TooLarge):
        value(SMALL, formula)


NO_VALUE = ["\\frac{1}{0}", "\\ln 0", "0^{-1}", "\\frac{1}{\\sqrt{2}^2-2}", "(-3)!", "\\tan\\frac{\\pi}{2}", "0^{0-1}"]


@pytest.mark.parametrize("formula", NO_VALUE)
def test_what_has_no_value_is_undefined(formula):
    with pytest.raises(Undefined):
        value(SMALL, formula)


def test_exact_numbers_do_not_grow_without_bound():
    number = Fraction(3)
    for _ in range(200):
        number = SMALL.multiply(number, number)
        bits = number.numerator.bit_length() if isinstance(number, Fraction) else 0
        assert bits <= values.MAX_BITS
        if isinstance(number, Ball):
            break
    assert isinstance(number, Ball)
