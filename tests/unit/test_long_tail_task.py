"""Text of the long-tail task: chains, verdicts, and lengths of its problems."""

from __future__ import annotations

import json
import random
import statistics

import chained_digits
import make_long_tail_task
import pytest
import small_model
from hypothesis import given
from hypothesis import strategies as st

DIGITS = st.lists(st.integers(0, 9), min_size=chained_digits.GIVEN, max_size=chained_digits.GIVEN)
STEPS = st.integers(1, chained_digits.LONGEST)


@given(DIGITS, STEPS)
def test_a_response_without_errors_follows_the_rule_and_ends_with_the_answer(digits, steps):
    response = chained_digits.careless_response(digits, steps, 0.0, random.Random(0))
    chain = f"{chained_digits.question(digits, steps)},{response}"
    parts = [(int(step[:2]), int(step[2:])) for step in chain.rstrip(",").split(",")]
    assert [count for count, _ in parts] == list(range(steps + chained_digits.GIVEN - 1, -1, -1))
    own = parts[chained_digits.GIVEN - 2 :]
    for (_, two_back), (_, before), (_, digit) in zip(own, own[1:], own[2:], strict=False):
        assert digit == (before + (3 if two_back >= 5 else 1)) % 10
    assert len(response) == chained_digits.STEP_TOKENS * steps
    assert chained_digits.is_correct({"gold_answer": chained_digits.answer(digits, steps)}, response)


@given(DIGITS, STEPS, st.integers(0, 10**6))
def test_a_verdict_needs_the_last_step_with_the_answer(digits, steps, seed):
    row = {"gold_answer": chained_digits.answer(digits, steps)}
    response = chained_digits.careless_response(digits, steps, 0.3, random.Random(seed))
    assert chained_digits.is_correct(row, response) == (response[-2] == row["gold_answer"])
    assert not chained_digits.is_correct(row, response[: -chained_digits.STEP_TOKENS])
    assert not chained_digits.is_correct(row, response[:-1])


def test_a_careless_hand_errs_in_the_first_step_as_often_as_asked():
    digits, generator = [1, 2, 3, 4], random.Random(0)
    right = chained_digits.careless_response(digits, 1, 0.0, generator)
    wrong = [chained_digits.careless_response(digits, 1, 0.2, generator) != right for _ in range(4000)]
    assert statistics.fmean(wrong) == pytest.approx(0.2, abs=0.025)  # four standard deviations


def test_lengths_are_heavy_tailed_and_held_out_chains_begin_otherwise(tmp_path):
    make_long_tail_task.make_problems(tmp_path, 0, training=7000, held_out=3000, demonstrations=500)
    lines = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("problems", "held_out", "chains", "demonstrations")
    }
    starts = {name: {row["question"][2::4] for row in rows} for name, rows in lines.items()}
    assert not starts["held_out"] & (starts["problems"] | starts["chains"] | starts["demonstrations"])
    tokens = [4 * int(row["question"][-3:-1]) + 1 for row in lines["problems"]]
    quantiles = statistics.quantiles(tokens, n=100)
    assert 5 <= quantiles[49] <= 13 and 200 <= quantiles[98] <= 385 and max(tokens) <= 385
    tokenizer = small_model.make_tokenizer()
    row = max(lines["demonstrations"], key=lambda row: len(row["response"]))
    assert len(tokenizer.encode(row["response"])) == len(row["response"]), "a token per character"
