"""Stages of tools/gpu_acceptance.py about operations: each planted fault is reported, in small shapes on the CPU."""

from __future__ import annotations

import itertools
import subprocess

import oreal_kernels
import pytest
import torch
from gpu_stages import comparison, kernels, machine, memcheck

DRY = machine.Machine(torch.device("cpu"), dry=True)
FAR = 11  # number of the case with more than 2^31 logits


class LostGradient(torch.autograd.Function):
    """Identity whose gradient lacks the first entry."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.view(-1)[0] = 0
        return gradient


def unwritten(result: torch.Tensor, runs: int) -> torch.Tensor:
    """The result without its last entry, as a kernel leaves it that stops too early."""
    out = torch.empty_like(result)
    out.view(-1)[:-1] = result.reshape(-1)[:-1]
    return out


FAULTS = {
    "value": lambda result, runs: result * 1.05,
    "nan": lambda result, runs: result + torch.full_like(result, torch.nan),
    "unwritten": unwritten,
    "second run": lambda result, runs: result * (1 + 2 * torch.finfo(result.dtype).eps * (runs % 2)),
    "gradient": lambda result, runs: result,
}
WITHOUT_GRADIENT = ("token_weights", "truncated_ratio")


def plant(monkeypatch: pytest.MonkeyPatch, operation: str, fault: str) -> None:
    """Let an operation return a wrong first result, or give a wrong gradient."""
    original, runs = getattr(oreal_kernels, operation), itertools.count()

    def faulty(*arguments, **options):
        if fault == "gradient":
            arguments = [LostGradient.apply(x) if torch.is_tensor(x) and x.requires_grad else x for x in arguments]
        result = original(*arguments, **options)
        if torch.is_tensor(result):
            return FAULTS[fault](result, next(runs))
        values = FAULTS[fault](result[0], next(runs)), *result[1:]
        return type(result)(*values) if hasattr(result, "_fields") else values

    monkeypatch.setattr(oreal_kernels, operation, faulty)


def failures(monkeypatch: pytest.MonkeyPatch, operation: str, case: int) -> list[str]:
    """Return the checks of one case that fail."""
    cases = kernels.OPERATIONS[operation]
    monkeypatch.setitem(kernels.OPERATIONS, operation, lambda device: itertools.islice(cases(device), case, case + 1))
    rows = kernels.judge(DRY, operation)
    return [f"{row.check}: {row.value}" for row in rows if row.result == machine.FAILED]


def test_every_public_operation_is_checked():
    assert set(kernels.OPERATIONS) == {name for name in oreal_kernels.__all__ if name.islower()}


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        (operation, fault)
        for operation, fault in itertools.product(kernels.OPERATIONS, FAULTS)
        if fault != "gradient" or operation not in WITHOUT_GRADIENT
    ],
)
def test_a_faulty_operation_fails(operation, fault, monkeypatch):
    plant(monkeypatch, operation, fault)
    checks = failures(monkeypatch, operation, case=2)
    expected = "second run" if fault in ("second run", "nan") else "error"
    assert any(expected in check for check in checks), checks
    assert fault != "gradient" or "gradient of" in checks[0]


@pytest.mark.parametrize("fault", ["unwritten", "gradient"])
def test_a_fault_in_the_far_rows_fails(fault, monkeypatch):
    plant(monkeypatch, "logprob_from_logits", fault)
    assert any("rows up to the last" in check for check in failures(monkeypatch, "logprob_from_logits", FAR))


def test_memory_without_a_value_is_nan():
    with comparison.PoisonedMemory():
        source = torch.ones(3)
        allocated = torch.empty(3), torch.empty_like(source), source.new_empty(3), torch.empty_strided((3,), (2,))
    assert all(tensor.isnan().all() for tensor in allocated) and torch.equal(source, torch.ones(3))


@pytest.mark.parametrize(
    ("code", "output", "results"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", ["pass"]),
        (0, "========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error", ["FAIL"]),
        (1, "ImportError\n========= ERROR SUMMARY: 0 errors", ["FAIL", "pass"]),
        (0, "compute-sanitizer found no device", ["FAIL"]),
    ],
)
def test_errors_of_the_sanitizer_are_counted(code, output, results, monkeypatch):
    monkeypatch.setattr(memcheck.shutil, "which", lambda name: f"/usr/bin/{name}")
    done = subprocess.CompletedProcess([], code, stdout=output)
    monkeypatch.setattr(memcheck.subprocess, "run", lambda command, **options: done)
    rows = list(memcheck.memcheck(machine.Machine(torch.device("cpu"), dry=False)))
    assert [row.result for row in rows] == results


def test_without_the_sanitizer_nothing_is_judged(monkeypatch):
    monkeypatch.setattr(memcheck.shutil, "which", lambda name: None)
    (row,) = memcheck.memcheck(machine.Machine(torch.device("cpu"), dry=False))
    assert row.result == machine.NOT_JUDGED and row.value == "compute-sanitizer is not installed"


def test_the_sanitizer_s_cases_are_all_cases():
    cases = sum(1 for operation in kernels.OPERATIONS.values() for _ in operation(DRY))
    assert memcheck.run_small_cases(torch.device("cpu")) == cases >= 70
