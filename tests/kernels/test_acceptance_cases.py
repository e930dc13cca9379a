"""Cases of tools/gpu_acceptance.py by Triton's kernels: their errors keep to the limits that a GPU is judged by."""

from __future__ import annotations

import pytest
import torch
from gpu_stages.comparison import Case, Results, error_over_limit, run, widen
from gpu_stages.kernels import OPERATIONS, rounding_of
from gpu_stages.machine import Machine
from oreal_kernels import backend

DRY = Machine(torch.device("cpu"), dry=True)
OF_TOKENS = {"oreal_loss": 8, "reward_loss": 4, "token_weights": 6}  # cases; those of logits and heads take minutes


def in_fp16(case: Case) -> Results:
    """Inputs without bfloat16, which the interpreter reads wrongly."""
    return {name: x.half() if x.dtype is torch.bfloat16 else x for name, x in case.inputs.items()}


@pytest.mark.parametrize("operation", OF_TOKENS)
def test_triton_s_kernels_keep_to_the_limits(operation):
    cases = list(OPERATIONS[operation](DRY))
    assert len(cases) == OF_TOKENS[operation]
    for case in cases:
        inputs = in_fp16(case)
        with backend.use("triton"):
            results = run(DRY, case.fused, inputs, case.leaves)
        plain = run(DRY, case.reference, inputs, case.leaves)
        exact = run(DRY, case.reference, widen(inputs), case.leaves)
        share, worst = error_over_limit(results, plain, exact, rounding_of(case))
        assert share <= 1, f"{case.name}: {worst}"
