"""Random expressions, written by sympy as LaTeX: the verdict of the rules against sympy's own evaluation."""

import sympy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from oreal_megatron.math_equality import equal

X, Y = sympy.symbols("x y", real=True)
POINTS = [{X: sympy.Rational(13, 7), Y: sympy.Rational(-5, 11)}, {X: sympy.Rational(-29, 17), Y: sympy.Rational(31, 9)}]
INTEGERS = st.integers(-12, 12).map(sympy.Integer)
FRACTIONS = st.tuples(st.integers(-9, 9), st.integers(1, 9)).map(lambda pair: sympy.Rational(*pair))
NUMBERS = st.one_of(INTEGERS, FRACTIONS, st.sampled_from([sympy.pi, sympy.sqrt(2), sympy.sqrt(3), sympy.E]))
# functions that are real at every real point: where a side leaves the reals, the rules follow a convention of their own
FUNCTIONS = [
    sympy.sin,
    sympy.cos,
    sympy.atan,
    sympy.Abs,
    lambda e: sympy.sqrt(1 + e**2),
    lambda e: e**2,
    lambda e: e**3,
]
REWRITINGS = [
    sympy.expand,
    sympy.together,
    sympy.factor,
    sympy.expand_trig,
    lambda e: 1 / (1 / (e**2 + 1)) - e**2 - 1 + e,
]


def built(leaves):
    """Return a strategy of expressions over the given leaves."""

    def combine(parts):
        pairs = st.tuples(parts, parts, st.sampled_from(["+", "-", "*", "/"]))
        functions = st.tuples(parts, st.sampled_from(FUNCTIONS)).map(lambda pair: pair[1](pair[0]))
        return st.one_of(pairs.map(arithmetic), functions)

    return st.recursive(leaves, combine, max_leaves=6)


def arithmetic(parts):
    """Return a sum, difference, product or quotient."""
    a, b, operator = parts
    if operator == "/":
        return a / (b**2 + 1)  # never a pole
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def equal_by_sympy(a, b):
    """Return whether two expressions agree to 40 digits at every point."""
    return all(abs((a - b).subs(point).evalf(60, maxn=400)) < sympy.Float("1e-40") for point in POINTS)


EXPRESSIONS = built(st.one_of(NUMBERS, st.sampled_from([X, Y])))


@settings(max_examples=150)
@given(EXPRESSIONS, st.sampled_from(REWRITINGS))
def test_a_rewritten_expression_is_equal(expression, rewrite):
    other = rewrite(expression)
    assert equal_by_sympy(expression, other)
    assert equal(sympy.latex(expression), sympy.latex(other))[0], (expression, other)


@settings(max_examples=150)
@given(EXPRESSIONS, EXPRESSIONS)
def test_the_verdict_on_two_expressions_is_sympys(first, second):
    assert equal(sympy.latex(first), sympy.latex(second))[0] is equal_by_sympy(first, second), (first, second)


@settings(max_examples=150)
@given(EXPRESSIONS, st.sampled_from([X, X * Y, sympy.Integer(1), sympy.pi**9, sympy.sin(X), sympy.Rational(1, 10**9)]))
def test_an_expression_and_a_small_term_is_different(expression, term):
    assert not equal(sympy.latex(expression), sympy.latex(expression + term / 1000))[0], (expression, term)


@settings(max_examples=150)
@given(built(NUMBERS))
def test_a_number_has_the_value_sympy_computes(number):
    """A number against its own decimals, rightly rounded, and against those of a neighbour."""
    value = number.evalf(60)
    assume(0.001 < abs(value) < 10**6 and not number.is_rational)  # a rational decimal may be the number itself
    shift = sympy.Rational(3, 10**15) * max(1, int(abs(value)))  # more than a double is off
    digits, neighbour = (f"{sympy.N(shifted, 40):.15f}" for shifted in (value, value + shift))
    assert equal(sympy.latex(number), digits)[0] and not equal(sympy.latex(number), neighbour)[0], number
