"""Stages `head` and `rivals` of tools/gpu_acceptance.py: how times are judged, by times that are given."""

from __future__ import annotations

import pytest
import torch
from gpu_stages import head, machine, rivals

DRY, GPU = (machine.Machine(torch.device("cpu"), dry=dry) for dry in (True, False))


def heads_of(monkeypatch, forward) -> list:
    """Return the rows of a machine on which CCE is installed and its head is `forward`."""
    monkeypatch.setattr(rivals.head_providers, "installed", lambda heads: iter([("CCE", forward)]))
    monkeypatch.setattr(rivals, "PACKAGES", {"CCE": "torch", "QuACK": "no_such_package"})
    return list(rivals.rivals(DRY))


def test_an_installed_head_is_timed_and_others_are_named(monkeypatch):
    rows = heads_of(monkeypatch, lambda: torch.ones((), requires_grad=True))
    by_check = {row.check: row for row in rows}
    assert by_check["head of QuACK"].value == "not installed" and "head of CCE" not in by_check
    assert by_check["CCE, 64 x 32 x 80"].value.endswith("of three products")
    assert by_check["CCE over linear_oreal_loss, 64 x 32 x 80"].criterion == ">= 1.3"
    assert all(row.result == machine.NOT_JUDGED for row in rows)


def test_a_head_that_fails_is_reported_and_the_others_still_run(monkeypatch):
    def fail():
        raise ImportError("libcuda is too old\nby far")

    values = {row.check: row.value for row in heads_of(monkeypatch, fail)}
    assert values["CCE, 64 x 32 x 80"] == "ImportError: libcuda is too old"
    assert "linear_oreal_loss, 64 x 32 x 80" in values and not any("CCE over" in check for check in values)


@pytest.mark.parametrize(("seconds", "result"), [(1.31, "pass"), (1.29, "FAIL")])
def test_heads_that_compute_logits_again_must_be_slower(seconds, result):
    times = {"linear_oreal_loss": 1.0, "CCE exact": seconds, "Liger": 0.5}
    assert [row.result for row in rivals.compare(GPU, "shape", times)] == [result]


def test_the_head_is_judged_for_all_columns_and_its_share_is_measured(monkeypatch):
    """Time: three products of one second each, and a head of 3.2 or 3.4 seconds."""
    for seconds, result in ((3.2, "pass"), (3.4, "FAIL")):
        monkeypatch.setattr(head, "_time_products", lambda *_: ({"logits": 700.0}, 3.0))
        monkeypatch.setattr(head, "COLUMNS", 640)
        monkeypatch.setattr(machine.Machine, "seconds", lambda self, function, seconds=seconds: seconds)
        monkeypatch.setattr(machine.Machine, "peak_bytes", lambda self, function: 1.6 * 2**30)
        full, share = (list(head._against_products(GPU, 128, 64, columns, (1280,))) for columns in (640, 80))
        assert [row.result for row in full] == [machine.NOT_JUDGED, result, "FAIL"], "1.6 GiB exceed 1.15 x 1.25"
        assert [row.result for row in share] == [machine.NOT_JUDGED, machine.NOT_JUDGED, "FAIL"]
