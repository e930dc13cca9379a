"""Golds of data files: solutions and damaged golds are read, reported with their lines, or refused."""

import json
import logging

import pytest

from oreal_megatron import config as c
from oreal_megatron.data import golds, problems
from oreal_megatron.math_equality import equals_itself, grade

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72"


@pytest.fixture
def read(tmp_path, caplog):
    """Return a function: lines of a file -> (golds, messages logged)."""
    golds._warn_once.cache_clear()

    def call(*lines):
        file = tmp_path / "data.jsonl"
        file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
        with caplog.at_level(logging.WARNING):
            rows = problems.read_problems(str(file))
        return [row["gold_answer"] for row in rows], caplog.text

    return call


def test_official_lines_of_gsm8k_have_the_number_behind_the_hashes_as_gold(read):
    answers, messages = read(
        {"question": "q", "answer": GSM8K}, {"question": "q", "answer": "5"}, {"question": "q", "answer": GSM8K}
    )
    assert answers == ["72", "5", "72"] and grade(answers[0], "\\boxed{72}").outcome == "correct"
    assert "2 gold answers are whole solutions" in messages and "(line 1, 3;" in messages and "'72'" in messages


def test_golds_damaged_by_json_escapes_are_repaired_and_reported(read):
    damaged = [
        r'{"question": "q", "gold_answer": "\frac{1}{2}"}',
        "",
        r'{"question": "q", "gold_answer": "\\df{29}{4}"}',
    ]
    answers, messages = read({"question": "q", "answer": "1"}, *damaged)
    assert answers == ["1", r"\frac{1}{2}", r"\dfrac{29}{4}"]
    assert "2 gold answers were damaged by JSON escapes" in messages and "(line 2, 4;" in messages


def test_the_report_comes_once_for_a_file_that_is_read_again(read):
    lines = [{"question": "q", "answer": GSM8K}]
    read(*lines)
    _, messages = read(*lines)
    assert messages.count("whole solutions") == 1


def test_what_cannot_be_repaired_is_refused_with_its_problem(read):
    answers, _ = read({"question": "q", "answer": "1"}, {"question": "q", "answer": "\x0cxyz{1}"})
    prompts = [problems.Prompt(number, "q", gold, None, (1,)) for number, gold in enumerate(answers)]
    with pytest.raises(c.ConfigError, match="problem 2: "):
        problems.check_golds(prompts, "f", equals_itself, drop=False)
    assert [prompt.gold for prompt in problems.check_golds(prompts, "f", equals_itself, drop=True)] == ["1"]
