"""Which part of a response is its answer."""

import time

import pytest

from oreal_megatron.math_equality import extract


@pytest.mark.parametrize(
    ("text", "answer", "joined"),
    [
        ("\\boxed{5}", "5", None),
        ("\\boxed {5} and done", "5", None),
        ("\\fbox{5}", "5", None),
        ("\\boxed5", "5", None),
        ("\\boxed\\pi", "\\pi", None),
        ("$\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}", None),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}", None),
        ("\\boxed{3}, no: \\boxed{5}", "5", None),
        ("\\boxed{5} \\boxed{}", "5", None),
        ("\\boxed{5} so \\boxed{ . }", "5", None),
        ("\\boxed{\\boxed{5}}", "\\boxed{5}", None),
        ("the answer is \\boxed{5", "5", None),
        ("the answer is \\boxed{5\nand more", "5", None),
        ("\\boxed{1} and \\boxed{2}", "2", "1 , 2"),
        ("$\\boxed{1}$, $\\boxed{2}$ and $\\boxed{3}$", "3", "1 , 2 , 3"),
        ("\\boxed{1} \\boxed{2} \\boxed{3}", "3", None),  # a spray of boxes is no list
        ("$x=\\boxed{1}$ and $y=\\boxed{2}$", "2", "1 , 2"),
    ],
)
def test_the_last_box_that_holds_something(text, answer, joined):
    assert extract.from_boxes(text) == extract.ExtractedAnswer(answer, joined)


@pytest.mark.parametrize("text", ["", "5", "\\boxed{}", "unboxed{5}", "\\boxed", "\\boxed{", "\\boxed{ $. }"])
def test_no_box_no_answer(text):
    assert extract.from_boxes(text) is None


def test_an_answer_is_found_behind_any_amount_of_text():
    assert extract.from_boxes("a {b} " * 50_000 + "\\boxed{7}").answer == "7"


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "\\boxed{{", "{", "\\boxed{1} ", "\\boxed{1}, ", "\\\\boxed{", "$", "\\text{ and "]
)
def test_the_search_is_linear(piece):
    """A box in a box in a box, never closed: one pass over half a megabyte, not one per box."""
    start = time.process_time()
    extract.from_boxes(piece * (500_000 // len(piece)))
    assert time.process_time() - start < 1.5


def test_thinking_ends_at_the_last_of_its_words():
    assert extract.after_thinking("a</t>b</t>c<|end|>d", ("</t>", "<|end|>")) == "d"
    assert extract.after_thinking("abc", ("</t>",)) == "abc" and extract.after_thinking("abc", ()) == "abc"
