"""Stages of tools/gpu_acceptance.py: errors of the fused operations on one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from oreal_kernels import gemm

from gpu_stages import row_cases, token_cases
from gpu_stages.comparison import Case, differing, error_over_limit, error_row, run, widen
from gpu_stages.machine import Machine, Row, error, use_trainer_products

OPERATIONS: dict[str, Callable[[Machine], Iterator[Case]]] = {  # every public one
    "logprob_from_logits": row_cases.logprob_from_logits,
    "linear_logprob": row_cases.linear_logprob,
    "linear_oreal_loss": row_cases.linear_oreal_loss,
    "oreal_loss": token_cases.oreal_loss,
    "reward_loss": token_cases.reward_loss,
    "prefix_reward_loss": token_cases.prefix_reward_loss,
    "token_weights": token_cases.token_weights,
    "truncated_ratio": token_cases.truncated_ratio,
    "rotary": token_cases.rotary,
}
EPSILON = torch.finfo(torch.float32).eps


def kernels(machine: Machine) -> Iterator[Row]:
    """Compare results and gradients of every operation with float64, twice, in memory that is filled with nan."""
    use_trainer_products()
    for operation in OPERATIONS:
        yield from judge(machine, operation)


def judge(machine: Machine, operation: str) -> Iterator[Row]:
    """Yield the largest error over its limit, each case that exceeds it, and how many differ in a second run."""
    largest, different, cases = (0.0, ""), 0, 0
    for case in OPERATIONS[operation](machine):
        first, second = (run(machine, case.fused, case.inputs, case.leaves) for _ in range(2))
        plain = run(machine, case.reference, case.inputs, case.leaves)
        exact = run(machine, case.reference, widen(case.inputs), case.leaves)
        share, result = error_over_limit(first, plain, exact, rounding_of(case))
        if share > 1:
            yield error_row(machine, "kernels", f"{operation}, {case.name}: error over its limit", share, result)
        largest = max(largest, (share, f"{result}, {case.name}"))
        different += differing(first, second) > 0
        cases += 1
    yield error_row(machine, "kernels", f"{operation}: largest error over its limit, {cases} cases", *largest)
    yield machine.at_most("kernels", f"{operation}: cases whose bits differ in a second run", different, 0)


def rounding_of(case: Case) -> float:
    """Return the rounding of a result in fp32, relative to its largest value: of a few operations, or of a long sum."""
    return max(8, case.summed**0.5) * EPSILON


def weight_gradient(machine: Machine) -> Iterator[Row]:
    """Add a bf16 product to an fp32 sum in place, from a transposed operand, against float64."""
    use_trainer_products()
    rows, columns, hidden = (64, 96, 32) if machine.dry else (4096, 38016, 3584)
    dlogits, x = machine.random(rows, columns), machine.random(rows, hidden)
    total = torch.ones(columns, hidden, device=machine.device)
    gemm.add_weight_gradient(dlogits, x, total)
    ends = torch.cat([torch.arange(columns)[:512], torch.arange(columns)[-512:]]).to(machine.device)
    exact = 1 + dlogits[:, ends].double().t() @ x.double()
    limit = rows**0.5 * EPSILON  # rounding of a sum of `rows` terms in fp32
    yield machine.at_most("weight_gradient", "relative error of the sum", error(total[ends], exact), limit)
