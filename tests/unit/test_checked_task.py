"""Text of the checked task: demonstrations, wrong steps, and the verifier's view of them."""

from __future__ import annotations

import json
import random

import checked_steps
import make_checked_task
import pytest
import small_model
from hypothesis import given
from hypothesis import strategies as st

from oreal_megatron.math_equality import extract

TERMS = st.lists(st.integers(0, 9), min_size=checked_steps.TERMS, max_size=checked_steps.TERMS)


@given(TERMS, st.lists(st.integers(0, 9), min_size=8, max_size=8))
def test_the_first_wrong_step_is_where_errors_begin(terms, errors):
    text, total = "", 0
    for term, error in zip(terms, errors, strict=True):
        total = (total + term + error) % 10
        text += f"{total}v"
    expected = next((2 * number for number, error in enumerate(errors) if error), None)
    assert checked_steps.first_wrong_step(checked_steps.question(terms), text) == expected
    wrong = [
        step.position for step in checked_steps.read_steps(checked_steps.question(terms), text) if not step.is_right
    ]
    assert wrong == [2 * number for number, error in enumerate(errors) if error], "later errors count by themselves"


@given(TERMS, st.integers(0, 10**6))
def test_demonstrations_mark_exactly_their_wrong_steps(terms, seed):
    question = checked_steps.question(terms)
    response = checked_steps.careless_response(terms, 0.3, random.Random(seed))
    steps = checked_steps.read_steps(question, response)
    assert len(steps) == len(terms)
    assert all((step.check == checked_steps.RIGHT) == step.is_right for step in steps)
    boxed = extract.from_boxes(response).answer
    if all(step.is_right for step in steps):
        assert boxed == checked_steps.answer(terms)
    assert boxed == response[steps[-1].position]


def test_the_share_of_wrong_steps_is_the_error_rate():
    generator = random.Random(0)
    responses = [checked_steps.careless_response([1] * 8, 0.15, generator) for _ in range(2000)]
    assert sum(text.count("x") - 1 for text in responses) / 16000 == pytest.approx(0.15, abs=0.01)  # x of \boxed


@pytest.mark.parametrize(
    ("response", "positions"),
    [("", []), ("abc", []), ("1v", [0]), ("1v3vxx", [0, 2]), ("1v3", [0]), ("1v3v6v\\boxed{6}", [0, 2, 4]),
     ("1v3v6v7v8v", [0, 2, 4])],
)  # fmt: skip
def test_steps_end_at_the_first_other_character_or_the_last_term(response, positions):
    assert [step.position for step in checked_steps.read_steps("1+2+3=", response)] == positions


def test_files_are_disjoint_and_every_character_is_a_token(tmp_path):
    make_checked_task.make_problems(tmp_path, 3, training=300, held_out=200, demonstrations=300)
    lines = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("problems", "held_out", "demonstrations", "checks")
    }
    questions = [line["question"] for part in lines.values() for line in part]
    assert len(set(questions)) == len(questions) == 1100
    tokenizer = small_model.make_tokenizer()
    for line in lines["demonstrations"]:
        assert len(tokenizer.encode(line["response"])) == len(line["response"])
        assert tokenizer.decode(tokenizer.encode(line["response"])) == line["response"]
