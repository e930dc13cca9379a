"""What counts as equal: a table, and what must hold whatever is in the table."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from oreal_megatron.math_equality import rules

LIBRARIES = ["torch", "sympy", "numpy", "httpx"]
TABLE = (Path(__file__).parent / "pairs.tsv").read_text().split("# different answers\n")
SAME, DIFFERENT = ([tuple(row.split("\t")) for row in part.splitlines() if "\t" in row] for part in TABLE)
LABELLED = [(gold, answer, True) for gold, answer in SAME] + [(gold, answer, False) for gold, answer in DIFFERENT]


@pytest.mark.parametrize(("gold", "answer", "want"), LABELLED)
def test_table(gold, answer, want):
    assert rules.equal(gold, answer)[0] is want


def test_every_gold_of_the_table_equals_itself_in_every_dress():
    dresses = (
        "{}",
        "  {} ",
        "\\boxed{{{}}}",
        "$ {} $",
        "{}.",
        "\\displaystyle {}",
        "{}\\,",
        "**{}**",
        "\\left. {} \\right.",
    )
    for gold, _, _ in LABELLED:
        for dress in dresses if gold else ():
            assert rules.equal(gold, dress.format(gold))[0], (gold, dress)


def test_different_stays_different_the_other_way_round():
    """Accepting may be one-sided (a gold decimal, a base left out); refusing what differs may not hide an order."""
    accepted = [(answer, gold) for gold, answer in DIFFERENT if answer and rules.equal(answer, gold)[0]]
    one_sided = {"7.78", "0.3333", "3.146", "0.333333333333334", "6.28"}  # a gold's decimal, name or percent sign
    one_sided |= {"\\cos\\theta=\\frac35", "|x|=3", "x=6=5", "x=-2,y=1"}
    one_sided |= {"\\frac12\\%", "0.25\\%", "\\frac{14}{3}\\%"}
    assert [pair for pair in accepted if not one_sided & set(pair)] == []


@pytest.mark.parametrize(
    ("response", "outcome", "method"),
    [
        ("so \\boxed{5}", "correct", "exact"),
        ("so \\boxed{\\frac{10}{2}}", "correct", "exact"),
        ("so \\boxed{\\sqrt{25}}", "correct", "exact"),
        ("so \\boxed{\\sqrt{24.9}}", "incorrect", "numeric"),
        ("so \\boxed{5\\cos^2 t+5\\sin^2 t}", "correct", "symbolic"),
        ("the answer is 5", "incorrect", "no answer"),
        ("", "incorrect", "no answer"),
        ("\\boxed{}", "incorrect", "no answer"),
    ],
)
def test_outcome_and_method(response, outcome, method):
    assert rules.grade("5", response)[:2] == (outcome, method)


def test_a_truncated_response_is_wrong_without_work():
    assert rules.grade("5", "\\boxed{5}", finished=False) == ("incorrect", "truncated", None)


def test_only_what_follows_the_thinking_counts():
    ends = ("</think>", "<|end_of_thought|>")
    assert rules.grade("5", "<think>\\boxed{5}</think> \\boxed{6}", True, ends).outcome == "incorrect"
    assert rules.grade("5", "<think>\\boxed{6}</think> \\boxed{5}", True, ends).outcome == "correct"
    assert rules.grade("5", "<think>\\boxed{5}</think> I do not know", True, ends).method == "no answer"
    assert rules.grade("5", "a</think>b</think>\\boxed{6}<|end_of_thought|>\\boxed{5}", True, ends).outcome == "correct"


@pytest.mark.parametrize("gold", ["", "   "])
def test_an_empty_gold_does_not_equal_itself(gold):
    assert not rules.equals_itself(gold)


def test_a_gold_in_several_boxes_can_be_met_by_several_boxes():
    assert rules.grade("1,2", "\\boxed{2} and \\boxed{1}").outcome == "correct"
    assert rules.grade("2", "\\boxed{1} and \\boxed{2}").outcome == "incorrect"  # hedging
    assert rules.grade("2", "first I had \\boxed{1}, but on checking it is \\boxed{2}").outcome == "correct"


TEXTS = [
    ("5", "The final answer is 5", True), ("5", "answer: 15", False), ("5", "We tried 3 methods. Step 5", False),
    ("12", "There are 12 months in a year, so I don't know.", False), ("73", "Final Answer: **73**", True),
    ("C", "I think the correct answer is C", True), ("C", "The correct option is \\boxed{B}. Not C.", False),
    ("3", "因此答案为：3。", True), ("18", "#### 18", True), ("5", "<answer>5</answer>", True),
    ("x\\ge5", "Therefore $x \\geq 5$ is the solution.", True), ("28\\%", "$28$ percent", True),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "text", "want"), TEXTS)
def test_texts_of_files_are_read_beyond_boxes(gold, text, want):
    assert (rules.grade_text(gold, text).outcome == "correct") is want


HEAVY = [
    "\\sum_{k=1}^{300}(49700+k)!", "+".join(f"{50000 - k}!" for k in range(400)), "x!" * 300,
    "\\sum_{k=1}^{300}\\sqrt{k!}",
    "\\sum_{k=1}^{300}\\sqrt{k+10^{-1900}}", "\\lfloor\\sqrt{x!}/1000\\rfloor+" * 60 + "1",
    "\\cup".join(f"(\\sqrt{{{k}!}},\\sqrt{{{k + 1}!}})" for k in range(1, 60)),
]  # fmt: skip


@pytest.mark.parametrize("answer", HEAVY)
def test_heavy_answers_end_of_themselves(answer):
    """The heavy text is the gold once too: every precision is tried there."""
    for gold in ("5", "x+1", "(0,1)", f"({answer})+0"):
        start = time.process_time()
        rules.grade_text(gold, answer)
        assert time.process_time() - start < 10  # processor seconds; without the bounds they take minutes


def test_the_package_stands_alone():
    """Importing it loads neither torch nor sympy nor any other package of this project."""
    code = "import sys, oreal_megatron.math_equality as m; m.grade('1', '1'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = {name.split(".")[1] for name in modules if name.startswith("oreal_megatron.")}
    assert ours == {"math_equality"} and not set(LIBRARIES) & set(modules)
