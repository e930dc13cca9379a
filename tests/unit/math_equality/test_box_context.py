"""Operators and words around a box belong to the answer; nothing else does."""

import math
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oreal_megatron.math_equality import extract, grade, grade_text

# text around the box of n, and the value of the whole; k is another number
OPERATORS = {
    r"-\boxed{%n}": lambda n, k: -n,
    r"x = -\boxed{%n}": lambda n, k: -n,
    r"the answer is -$\boxed{%n}$": lambda n, k: -n,
    r"x = - \boxed{%n}": lambda n, k: -n,
    r"negative $\boxed{%n}$": lambda n, k: -n,
    r"−\boxed{%n}": lambda n, k: -n,
    r"%k\boxed{%n}": lambda n, k: k * n,
    r"%k \cdot \boxed{%n}": lambda n, k: k * n,
    r"%k(\boxed{%n})": lambda n, k: k * n,
    r"%k - \boxed{%n}": lambda n, k: k - n,
    r"\boxed{%n} + %k": lambda n, k: n + k,
    r"\boxed{%n} \times %k": lambda n, k: n * k,
    r"\boxed{%n}\times 10^3": lambda n, k: n * 1000,
    r"\boxed{%n} x 10^3": lambda n, k: n * 1000,
    r"\boxed{%n}/%k": lambda n, k: Fraction(n, k),
    r"\frac{\boxed{%n}}{%k}": lambda n, k: Fraction(n, k),
    r"\frac{%k}{\boxed{%n}}": lambda n, k: Fraction(k, n),
    r"\dfrac{1}{%k}\boxed{%n}": lambda n, k: Fraction(n, k),
    r"\sqrt{\boxed{%n}}": lambda n, k: None,
    r"\sqrt[3]{\boxed{%n}}": lambda n, k: None,
    r"\ln \boxed{%n}": lambda n, k: None,
    r"\boxed{%n}\pi": lambda n, k: None,
    r"\boxed{%n}x": lambda n, k: None,
    r"\pm\boxed{%n}": lambda n, k: None,
    r"\boxed{%n}^2": lambda n, k: n * n,
    r"\left(\boxed{%n}\right)^2": lambda n, k: n * n,
    r"%k^{\boxed{%n}}": lambda n, k: k**n,
    r"\boxed{%n}!": lambda n, k: math.factorial(n),
    r"\binom{\boxed{%n}}{2}": lambda n, k: n * (n - 1) // 2,
    r"\boxed{%n} \text{ million}": lambda n, k: n * 10**6,
    r"$\boxed{%n}$ million dollars": lambda n, k: n * 10**6,
    r"\boxed{%n} dozen": lambda n, k: n * 12,
    r"\boxed{%n}万": lambda n, k: n * 10**4,
    r"\boxed{%n},000": lambda n, k: n * 1000,
    r"half of \boxed{%n}": lambda n, k: None,
    r"the reciprocal of \boxed{%n}": lambda n, k: None,
    r"\boxed{%n} or %k": lambda n, k: None,
    r"\boxed{%n} halves": lambda n, k: None,
    r"\lfloor \boxed{%n}/%k \rfloor": lambda n, k: n // k,
    r"$\left\lceil \boxed{%n}/%k \right\rceil$": lambda n, k: -(-n // k),
    r"\boxed{%n}:%k": lambda n, k: None,
    r"$%k:\boxed{%n}$": lambda n, k: None,
}
# text around the box in which its content is the answer
NEUTRAL = [
    r"%b",
    r"$%b$",
    r"$$%b$$",
    r"\[ x = %b. \]",
    r"(%b)",
    r"$\left(%b\right)$",
    r"**%b**",
    r"$\mathbf{%b}$",
    "`%b`",
    r"%b.",
    r"x = %b \quad (2)",
    r"The sum of 3 and 4 is $3 + 4 = %b$.",
    r"$\therefore %b$",
    r"Step 3: %b",
    r"Step 3 %b",
    r"1) %b",
    r"- %b",
    r"* %b",
    "Answer: - $%b$\n",
    "Final answer – %b",
    r"%b - since it is even",
    r"%b (since $x>0$)",
    r"$%b$!",
    r"%b is the answer",
    r"So %b is not divisible by 11.",
    r"%b\text{ cm}",
    r"$%b$ ways",
    r"$3!+1=%b$",
    r"%b\,\text{m}",
    r"\begin{aligned} x &= 3 \\ &= %b \end{aligned}",
    r"the amount %b",
    r"\colorbox{yellow}{%b}",
    r"\text{Answer: %b}",
    r"The area is %b times the original",
    r"%b quarters",
    r"$f(x) \ge %b$",
    r"The answer is not 4, it is %b",
    r"\\%b",
    r"Option A is wrong. %b",
    r"%b $\blacksquare$",
    r"$(3, %b)$",
    r"I have a %b",
    r"A is not right, so %b",
    "| step | value |\n|---|---|\n| 3 | %b |",
    "|3|%b|",
    r"Part 3:%b",
    r"%b: 3 people",
    r"%b. But this is not needed.",
    r"%b. No, that is all.",
    "$$\n%b\n$$",
]
DENIED = [
    r"not %b",
    r"It is not $%b$.",
    r"the answer isn't %b",
    r"the answer cannot be %b",
    r"x \ne %b",
    r"rather than %b",
    r"不是%b",
    r"%b is wrong",
    r"$%b$ is not the answer",
    r"I had %b, but that is wrong",
    r"the wrong answer: %b",
    r"\cancel{%b}",
    r"%b? No, that is wrong",
    r"%b. Wait, this is not right",
    r"%b; however, the correct answer is not this",
    r"%b. But the right answer should be another",
]


@settings(max_examples=300)
@given(st.sampled_from(sorted(OPERATORS)), st.integers(2, 12), st.integers(13, 29), st.booleans())
def test_operators_around_a_box_are_part_of_the_answer(template, n, k, in_a_sentence):
    text = template.replace("%n", str(n)).replace("%k", str(k))
    text = f"We add all of them.\nSo {text}" if in_a_sentence else text
    value = OPERATORS[template](n, k)
    assert value == n or grade(str(n), text).outcome == "incorrect"  # 2! is 2
    assert value is None or grade(str(value), text).outcome == "correct", (text, value)


@given(
    st.integers(2, 99),
    st.sampled_from(["|%b|", r"\left|%b\right|", r"\left| %b \right|", r"\lvert%b\rvert", "|%b|+%k", "%k|%b|"]),
    st.integers(2, 9),
)
def test_an_absolute_value_around_a_box_is_part_of_the_answer(n, template, k):
    text = "$" + template.replace("%b", rf"\boxed{{-{n}}}").replace("%k", str(k)) + "$"
    value = n + k if "+" in template else n * k if template.startswith("%k") else n
    assert grade(str(value), text).outcome == "correct", extract.from_boxes(text)
    assert grade(str(-n), text).outcome == "incorrect" == grade(str(-value), text).outcome


@pytest.mark.parametrize(
    "content", ["5", "-5", r"\frac{1}{2}", "x^2+1", "(1,2)", r"\{1,2\}", "C", r"\text{even}", r"12\text{ cm}"]
)
@pytest.mark.parametrize("template", NEUTRAL)
def test_other_text_around_a_box_is_not(template, content):
    text = template.replace("%b", rf"\boxed{{{content}}}")
    assert grade(content, text).outcome == "correct", extract.from_boxes(text)


@pytest.mark.parametrize("template", DENIED)
def test_a_box_that_the_words_around_it_deny_is_no_answer(template):
    text = template.replace("%b", r"\boxed{5}")
    assert extract.from_boxes(text) is None
    assert grade("5", text) == ("incorrect", "no answer", None)
    assert grade("7", rf"\boxed{{7}}. {text}").outcome == "correct"
    assert (
        grade_text("5", text).outcome == "incorrect"
        and grade_text("7", f"{text}, so the answer is 7").outcome == "correct"
    )


def test_every_box_of_a_list_has_its_own_operators():
    assert grade("1,-2", r"$x=\boxed{1}$, $x=-\boxed{2}$").outcome == "correct"
    assert grade("1,2", r"$x=\boxed{1}$, $x=-\boxed{2}$").outcome == "incorrect"
    assert grade("(3,5)", r"$(\boxed{3}, \boxed{5})$").outcome == "correct"
    assert grade(r"2\sqrt3", r"$\boxed{2}\sqrt{\boxed{3}}$").outcome == "correct"


@pytest.mark.parametrize(
    "piece", [" ", "(", "{", "- ", "\\sqrt{", "$", "not ", "1 ", "\\text{ and ", "~~", "2 \\cdot "]
)
def test_the_text_around_a_box_costs_little(piece):
    start = time.process_time()
    for text in (piece * 50_000 + "\\boxed{5}", "\\boxed{5}" + piece * 50_000, (piece * 9 + "\\boxed{5}, ") * 60):
        extract.from_boxes(text)
    assert time.process_time() - start < 0.5
