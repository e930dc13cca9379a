"""Golds that are solutions give their answer; golds damaged by JSON escapes are repaired or are no golds."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oreal_megatron.math_equality import equal, equals_itself, grade, grade_text, read_gold

ANSWERS = ["7", "-3", "1,234", r"\frac{1}{2}", "x^2+1", "(1,2)", r"\$5", r"12\text{ cm}"]
SOLUTIONS = [
    "He has 3 and gets one.\nThat is 7*1=<<7*1=7>>7.\n#### {}",
    "#### {}",
    "so $\\boxed{{{}}}$",
    "We add.\n\nThus $x=\\boxed{{{}}}$.",
    "First 3+4.\nThe final answer is ${}$.",
    "Some text <answer>{}</answer>",
    "With $\\boxed{{1}}$ excluded we get $\\boxed{{{}}}$",
]


@pytest.mark.parametrize("solution", SOLUTIONS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_answer_is_taken_out_of_a_solution(solution, answer):
    gold = solution.format(answer)
    assert read_gold(gold).change == "solution" and equals_itself(gold)
    assert grade(gold, f"\\boxed{{{answer}}}").outcome == "correct" and grade_text(gold, answer).outcome == "correct"
    assert grade(gold, "\\boxed{99}").outcome == "incorrect"


@pytest.mark.parametrize(
    "gold",
    [*ANSWERS, r"$\boxed{\frac12}$", r"\boxed{5}", "Evelyn", r"\text{all } x \text{ with } x>3", "A and B", "12 feet"],
)
def test_an_answer_stays_as_it_is(gold):
    assert read_gold(gold) == (gold, "") and equals_itself(gold)


COMMANDS = [
    r"\frac{1}{2}",
    r"\tfrac{1}{2}",
    r"\binom{5}{2}",
    r"\theta",
    r"\beta+1",
    r"3\times 4",
    r"\text{cm}",
    r"\tan x",
    r"1\ne 2",
    r"x\neq 3",
    r"\rho",
    r"\left(1\right)",
    r"\bar{z}",
    r"\nu+1",
    r"\varphi",
    r"\alpha",
    r"\tau",
    r"\frac{\theta}{2}",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"\lfloor x\rfloor",
    r"\sqrt{\frac{3}{4}}",
    r"\frac{a}{b}\times\frac{c}{d}",
]
ESCAPES = {r"\a": "\a", r"\b": "\b", r"\f": "\f", r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\v": "\v"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_escapes_have_eaten_are_read_again(command):
    damaged = command
    for escape, character in ESCAPES.items():  # as json.loads and Python read a single backslash
        damaged = damaged.replace(escape, character)
    assert equal(damaged, command)[0] and equals_itself(damaged)
    if set(damaged) & set("\b\f\v\a"):
        assert read_gold(damaged).change == "escapes"


@given(
    st.integers(1, 999),
    st.integers(1, 999),
    st.sampled_from([r"\df", r"\tf", "rac", "frac", "\frac", "\tfrac", "\dfrac"]),
)
def test_damaged_fractions_are_fractions(top, bottom, command):
    gold = f"{command}{{{top}}}{{{bottom}}}"
    assert equal(gold, rf"\frac{{{top}}}{{{bottom}}}")[0]
    assert not equal(gold, rf"\frac{{{top + 1}}}{{{bottom}}}")[0]


@pytest.mark.parametrize(
    "gold", ["5\b", "x\x00", "\x0cfoo{1}", "\text{13}", "This is a proof in many words, " * 12, json.loads(r'"\fxyz"')]
)
def test_what_cannot_be_repaired_is_no_gold(gold):
    assert not equals_itself(gold)


STRUCTURED = [
    r"\frac{1}{2}", r"\sqrt{2}", r"x^{2}+1", "(1,2)", r"\left[0,1\right)", r"\begin{pmatrix}1&2\end{pmatrix}", "2/3",
    "f(x)=x^2", r"3\times4", r"\binom{5}{2}", r"\sqrt[3]{2}", r"\{(1,2),(3,4)\}", r"$\dfrac{a}{b}$", r"2\cdot3^{n}",
]  # fmt: skip
OPENED = ("{", "(", "[", "^", "/", "=", r"\times", r"\cdot", r"\frac", r"\sqrt", r"\binom", r"\left", "{1}")


@pytest.mark.parametrize("gold", STRUCTURED)
def test_a_gold_that_ends_within_an_operand_is_no_gold(gold):
    cuts = [end for end in range(1, len(gold)) if gold[:end].endswith(OPENED) and gold[end : end + 1] != ""]
    for cut in [
        gold[:end] for end in cuts if r"\begin" in gold or not gold[:end].endswith("1}") or "frac" in gold[:end]
    ]:
        assert not equals_itself(cut), cut
    assert cuts and equals_itself(gold)


@pytest.mark.parametrize("gold", ["?", "??", "...", "-", "—", "* * *", "#", "&", '"', r"\text{ }", r"\boxed{}", "$$",
                                  "nan", "NaN", "null", "N/A", r"\frac{}{}", "{", "x=", "2^"])  # fmt: skip
def test_a_placeholder_is_no_gold(gold):
    assert not equals_itself(gold)


@pytest.mark.parametrize("gold", ["<", ">", "=", "+", "A+", "O-", "{}", "()", r"\{\}", "None", "[3,4[", "]3,4]", "a)",
                                  "(0,1]", r"\frac{1}{2", r"\$5", "1,2,", r"{}^{14}C", r"\infty", r"5\%"])  # fmt: skip
def test_a_short_or_untidy_gold_is_one(gold):
    assert equals_itself(gold)
