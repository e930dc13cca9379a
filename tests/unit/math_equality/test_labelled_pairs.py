"""Accuracy and speed on the labelled pairs and golds of ../shared/data, where it is present."""

import statistics
import time

import pytest

from oreal_megatron.math_equality import rules

FILES = (
    "math500",
    "gsm8k_train",
    "gsm8k_test",
    "aime2024",
    "aime2025",
    "aime_1983_2023",
    "amc23",
    "olympiadbench_math_en",
)


def test_accuracy_and_speed_on_the_labelled_pairs(shared_rows):
    rows = [row for row in shared_rows("grading_pairs.jsonl") if not row["kind"].startswith("convention")]
    false_accepts = false_rejects = 0
    seconds = []
    for row in rows:
        start = time.thread_time()
        correct = rules.grade_text(row["gold"], row["pred"]).outcome == "correct"
        seconds.append(time.thread_time() - start)
        false_accepts += correct and not row["label"]
        false_rejects += not correct and bool(row["label"])
    assert false_accepts == 0 and false_rejects <= 10
    assert statistics.median(seconds) <= 0.001 and sorted(seconds)[int(0.99 * len(seconds))] <= 0.05


def test_lines_of_field_reports_are_graded_right(shared_rows):
    """Kinds named convention- and known-gap- are excluded: people differ on them, or the judge decides them."""
    wrong = []
    for row in shared_rows("field_pairs.jsonl"):
        if row["kind"].startswith(("convention-", "known-gap-")):
            continue
        if "pred" in row:
            graded = rules.grade_text(row["gold"], row["pred"])
        else:
            graded = rules.grade(row["gold"], row["response"], True, ("</think>",))
        if (graded.outcome == "correct") != bool(row["label"]):
            wrong.append(row)
    assert wrong == []


@pytest.mark.parametrize("name", FILES)
def test_every_gold_equals_itself(shared_rows, name):
    golds = [str(row["answer"]) for row in shared_rows(f"{name}.jsonl")]
    assert [gold for gold in golds if not rules.equals_itself(gold)] == []
