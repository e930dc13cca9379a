"""Who is guilty of a hang: a table of what ranks tell, and what a person would say of it."""

from __future__ import annotations

import dataclasses
import time

import pytest

from oreal_megatron.runtime import hang_diagnosis, heartbeat
from oreal_megatron.runtime.hang_diagnosis import Report


def rank(number: int, idle_s: float = 1.0, **fields) -> Report:
    told = {"phase": "policy", "micro_batch": 2, "borders": 7, "limit_s": 60.0, "waits": False}
    return Report(number, "host", 4711, 9, 3, idle_s=idle_s, **told | fields)


def guilty(*reports: Report) -> tuple[int, ...] | None:
    verdict = hang_diagnosis.judge(reports, silent_limit_s=30.0)
    return verdict and verdict.guilty


def test_nobody_is_guilty_while_someone_goes_on():
    assert guilty(rank(0), rank(1)) is None
    assert guilty(rank(0, 500, waits=True), rank(1, 5)) is None, "waits for a slow rank"
    assert guilty(rank(0, 500, borders=8), rank(1, 5)) is None, "is ahead: a phase where nobody waits in a collective"
    assert guilty(rank(0, 500, waits=True), rank(1, 500, waits=True), rank(2, 5, waits=True)) is None, "2 is not late"


def test_who_waits_is_not_guilty():
    assert guilty(rank(0, 90, waits=True), rank(1, 61)) == (1,)
    assert guilty(rank(0, 90), rank(1, 61, borders=6)) == (1,), "the others are a phase ahead"
    assert guilty(rank(0, 90, waits=True), rank(1, 61), rank(2, 62), rank(3, 5)) == (1, 2)
    assert guilty(rank(0, 70, waits=True, borders=6), rank(1, 90)) == (1,), "it went on without the others"


def test_all_in_collectives_wait_for_each_other():
    verdict = hang_diagnosis.judge([rank(0, 61, waits=True), rank(1, 62, waits=True, micro_batch=3)], 30.0)
    assert verdict.guilty == (0, 1) and "all wait in collectives, for each other" in verdict.sentence
    assert "micro-batch 2; phase policy of step 3, micro-batch 3" in verdict.sentence


def test_each_phase_has_its_own_limit():
    assert guilty(rank(0, 90, limit_s=100.0)) is None and guilty(rank(0, 90, limit_s=80.0)) == (0,)


def test_a_lost_rank_comes_before_what_its_loss_does_to_others():
    stuck, failing = rank(0, 90), rank(2, state=hang_diagnosis.FAILING, error="RuntimeError: connection closed by peer")
    assert guilty(stuck, rank(1).found(gone=True, silent_s=2), failing) == (1,)
    assert guilty(stuck, rank(1).found(gone=False, silent_s=31), failing) == (1,)
    assert guilty(rank(0), rank(1).found(gone=False, silent_s=29), failing) is None, "wait and see"
    gone = failing.found(gone=True, silent_s=2)
    assert guilty(stuck, gone, rank(1).found(gone=True, silent_s=2)) == (1,)
    assert "ended with RuntimeError: connection" in hang_diagnosis.judge([stuck, gone], 30.0).sentence


def test_a_rank_that_failed_alone_is_lost_and_one_that_is_done_is_not():
    failed = rank(1, state=hang_diagnosis.FAILED, error="ValueError: a bug")
    assert hang_diagnosis.judge([rank(0), failed], 30.0).sentence == (
        "rank 1 is lost, last seen in phase policy of step 3, micro-batch 2: it ended with ValueError: a bug"
    )
    assert guilty(rank(0), rank(1, 500, state=hang_diagnosis.DONE).found(gone=True, silent_s=500)) is None


def test_what_is_told_is_what_is_read():
    report = rank(3, 1.5, state=hang_diagnosis.FAILING, error='"quoted" \\ and ünusual')
    assert hang_diagnosis.report(hang_diagnosis.encode(report)) == report
    verdict = hang_diagnosis.Diagnosis((1, 2), "ranks 1, 2 are stuck", None, by=3)
    assert hang_diagnosis.verdict(hang_diagnosis.encode(verdict)) == verdict


def test_phases_lie_within_phases_and_every_border_counts(monkeypatch):
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
