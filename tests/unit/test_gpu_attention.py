"""Stage `attention` of tools/gpu_acceptance.py: each planted fault is reported, in small shapes on the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gpu_stages import attention, machine

DRY = machine.Machine(torch.device("cpu"), dry=True)
CHECKS = {
    (name, rows)
    for name in ("one sequence", "mixed sequences and a filler")
    for rows in ("all rows", "two context-parallel ranks")
}


def failures() -> set[tuple[str, str]]:
    """Return pack and rows of the checks that fail."""
    rows = [row for row in attention._errors(DRY, (3, 1, 16)) if row.result == machine.FAILED]
    return {(row.check.split(",")[0], row.check.split(", ")[2].split(":")[0]) for row in rows}


def test_faultless_attention_passes():
    assert not failures()


def test_a_wrong_last_row_fails(monkeypatch):
    original = attention.AttentionPlan.attend

    def attend(self, query, key, value):
        attended = original(self, query, key, value)
        return torch.cat([attended[:-1], attended[-1:] * 0.9])

    monkeypatch.setattr(attention.AttentionPlan, "attend", attend)
    assert failures() == CHECKS


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_a_wrong_gradient_fails(argument, monkeypatch):
    original = attention.AttentionPlan.attend

    def attend(self, *tensors):
        changed = list(tensors)
        changed[argument] = 0.05 * tensors[argument].detach() + 0.95 * tensors[argument]
        return original(self, *changed)

    monkeypatch.setattr(attention.AttentionPlan, "attend", attend)
    assert failures() == CHECKS


def test_attention_across_sequences_fails(monkeypatch):
    original = attention.segments
    monkeypatch.setattr(attention, "segments", lambda offsets, chunks: original([0, offsets[-1]], chunks))
    assert failures() == {check for check in CHECKS if "mixed" in check[0]}


def test_a_rank_that_does_not_see_earlier_keys_fails(monkeypatch):
    original = attention.segments

    def own_keys(offsets, chunks):
        return tuple(
            dataclasses.replace(part, keys=part.keys[-len(part.queries) :]) for part in original(offsets, chunks)
        )

    monkeypatch.setattr(attention, "segments", own_keys)
    assert failures() == {check for check in CHECKS if "ranks" in check[1]}


def test_the_kernel_that_takes_most_time_is_named():
    x = torch.ones(200, 200)
    assert attention.longest_kernel(DRY, lambda: (x @ x).sum()) == "aten::mm"
