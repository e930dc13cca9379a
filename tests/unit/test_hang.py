"""Diagnosis of a hang: progress reports of ranks, and the ranks that a person would name."""

from __future__ import annotations

import dataclasses
import time

import pytest

from oreal_megatron.runtime import hang_diagnosis, heartbeat
from oreal_megatron.runtime.hang_diagnosis import ProgressReport


def rank(number: int, idle_s: float = 1.0, **fields) -> ProgressReport:
    fields_of_all = {"phase": "policy", "micro_batch": 2, "transitions": 7, "limit_s": 60.0, "in_collective": False}
    return ProgressReport(number, "host", 4711, 9, 3, idle_s=idle_s, **fields_of_all | fields)


def blocking(*reports: ProgressReport) -> tuple[int, ...] | None:
    diagnosis = hang_diagnosis.diagnose(reports, silent_limit_s=30.0)
    return diagnosis and diagnosis.ranks


def test_nobody_is_named_while_someone_makes_progress():
    assert blocking(rank(0), rank(1)) is None
    assert blocking(rank(0, 500, in_collective=True), rank(1, 5)) is None, "waits for a slow rank"
    assert blocking(rank(0, 500, transitions=8), rank(1, 5)) is None, (
        "is ahead: a phase where nobody waits in a collective"
    )
    assert (
        blocking(rank(0, 500, in_collective=True), rank(1, 500, in_collective=True), rank(2, 5, in_collective=True))
        is None
    ), "2 is not late"


def test_who_waits_is_not_named():
    assert blocking(rank(0, 90, in_collective=True), rank(1, 61)) == (1,)
    assert blocking(rank(0, 90), rank(1, 61, transitions=6)) == (1,), "the others are a phase ahead"
    assert blocking(rank(0, 90, in_collective=True), rank(1, 61), rank(2, 62), rank(3, 5)) == (1, 2)
    assert blocking(rank(0, 70, in_collective=True, transitions=6), rank(1, 90)) == (1,), (
        "it went on without the others"
    )


def test_all_in_collectives_wait_for_each_other():
    diagnosis = hang_diagnosis.diagnose(
        [rank(0, 61, in_collective=True), rank(1, 62, in_collective=True, micro_batch=3)], 30.0
    )
    assert diagnosis.ranks == (0, 1) and "all wait for each other in collectives" in diagnosis.message
    assert "micro-batch 2; phase policy of step 3, micro-batch 3" in diagnosis.message


def test_each_phase_has_its_own_limit():
    assert blocking(rank(0, 90, limit_s=100.0)) is None and blocking(rank(0, 90, limit_s=80.0)) == (0,)


def test_a_lost_rank_comes_before_what_its_loss_does_to_others():
    stuck, failing = rank(0, 90), rank(2, state=hang_diagnosis.FAILING, error="RuntimeError: connection closed by peer")
    assert blocking(stuck, rank(1).observed(gone=True, silent_s=2), failing) == (1,)
    assert blocking(stuck, rank(1).observed(gone=False, silent_s=31), failing) == (1,)
    assert blocking(rank(0), rank(1).observed(gone=False, silent_s=29), failing) is None, "wait and see"
    gone = failing.observed(gone=True, silent_s=2)
    assert blocking(stuck, gone, rank(1).observed(gone=True, silent_s=2)) == (1,)
    assert "ended with RuntimeError: connection" in hang_diagnosis.diagnose([stuck, gone], 30.0).message


def test_a_rank_that_failed_alone_is_lost_and_one_that_is_done_is_not():
    failed = rank(1, state=hang_diagnosis.FAILED, error="ValueError: a bug")
    assert hang_diagnosis.diagnose([rank(0), failed], 30.0).message == (
        "rank 1 is lost, last seen in phase policy of step 3, micro-batch 2: it ended with ValueError: a bug"
    )
    assert blocking(rank(0), rank(1, 500, state=hang_diagnosis.DONE).observed(gone=True, silent_s=500)) is None


def test_reports_and_diagnoses_survive_encoding():
    report = rank(3, 1.5, state=hang_diagnosis.FAILING, error='"quoted" \\ and ünusual')
    assert hang_diagnosis.decode_report(hang_diagnosis.encode(report)) == report
    diagnosis = hang_diagnosis.Diagnosis((1, 2), "ranks 1, 2 are hung", None, reporter=3)
    assert hang_diagnosis.decode_diagnosis(hang_diagnosis.encode(diagnosis)) == diagnosis


def test_phases_lie_within_phases_and_every_transition_counts(monkeypatch):
    monkeypatch.setattr(heartbeat, "progress", heartbeat.Progress())
    heartbeat.step(4)
    with heartbeat.phase("evaluate"):
        heartbeat.beat(2)
        assert dataclasses.astuple(heartbeat.progress)[:4] == (4, "evaluate", 2, 2)
    assert dataclasses.astuple(heartbeat.progress)[:4] == (4, "step", None, 3)
    with pytest.raises(ValueError), heartbeat.phase("verify"):
        raise ValueError
    assert heartbeat.progress.phase == "verify", "where it failed"


def test_a_beat_costs_less_than_ten_microseconds(monkeypatch):
    monkeypatch.setattr(heartbeat, "progress", heartbeat.Progress())
    rounds = []
    for _ in range(20):
        start = time.perf_counter()
        for micro_batch in range(1000):
            heartbeat.beat(micro_batch)
        rounds.append((time.perf_counter() - start) / 1000)
    assert min(rounds) < 10e-6
