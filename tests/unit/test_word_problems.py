"""The problems of examples/smollm2.sh: sums that add up, and no problem on both sides of training."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent.parent / "tools/make_word_problems.py"
SIZES = ("--training", "300", "--held-out", "100", "--demonstrations", "200")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("problems")
    subprocess.run([sys.executable, str(TOOL), str(folder), *SIZES], check=True)
    return {file.stem: [json.loads(line) for line in file.open()] for file in folder.glob("*.jsonl")}


def test_every_step_of_a_worked_answer_is_right_and_the_last_result_is_boxed(made):
    for line in made["demonstrations"]:
        steps = re.findall(r"(\d+ [-+*] \d+) = (\d+)\.", line["response"])
        assert len(steps) == 2 and all(eval(task) == int(result) for task, result in steps)
        assert line["response"].endswith(f"\\boxed{{{steps[1][1]}}}.")


def test_every_number_of_the_question_is_used_and_the_first_result_goes_on(made):
    for line in made["demonstrations"]:
        first, second = re.findall(r"(\d+) [-+*] (\d+) = (\d+)", line["response"])
        assert first[2] in second[:2]
        used = [*first[:2], *second[:2]]
        used.remove(first[2])
        assert sorted(used) == sorted(re.findall(r"\d+", line["question"]))


def test_no_problem_is_in_two_files_or_twice_in_one(made):
    questions = [line["question"] for lines in made.values() for line in lines]
    assert len(questions) == len(set(questions)) == 600
    assert [len(made[name]) for name in ("problems", "held_out", "demonstrations")] == [300, 100, 200]
