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
        start = time.perf_counter()
        correct = rules.grade_text(row["gold"], row["pred"]).outcome == "correct"
        seconds.append(time.perf_counter() - start)
        false_accepts += correct and not row["label"]
        false_rejects += not correct and bool(row["label"])
    assert 1 - (false_accepts + false_rejects) / len(rows) >= 0.99 and false_accepts <= 5
    assert statistics.median(seconds) <= 0.001 and sorted(seconds)[int(0.99 * len(seconds))] <= 0.05


@pytest.mark.parametrize("name", FILES)
def test_every_gold_equals_itself(shared_rows, name):
    golds = [str(row["answer"]) for row in shared_rows(f"{name}.jsonl")]
    assert [gold for gold in golds if not rules.equals_itself(gold)] == []
