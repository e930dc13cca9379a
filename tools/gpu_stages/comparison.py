"""Comparison of an operation with its reference in float64, for the stages of tools/gpu_acceptance.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_stages.machine import Machine, Row

Results = dict[str, Tensor]
Compute = Callable[[Results], Results]
ENTROPY_ROUNDING = 2e-7  # nats; entropies next to 0 are differences of numbers next to 1

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of an operation, and how the operation and its reference compute named results from them."""

    name: str
    inputs: Results  # the reference in float64 gets the floating-point ones in float64
    leaves: tuple[str, ...]  # inputs that get a gradient
    fused: Compute
    reference: Compute
    summed: int = 1  # terms of a sum in float32, of which the reference's own error may have none


class PoisonedMemory(TorchDispatchMode):
    """Fill memory that is allocated without a value with nan, so that an element that nobody writes shows."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in _ALLOCATIONS and result.is_floating_point():
            result.fill_(torch.nan)
        return result


def run(machine: Machine, compute: Compute, inputs: Results, leaves: tuple[str, ...]) -> Results:
    """Return the results of an operation and the gradients of its leaves.

    The gradients of the results are random numbers, the same for every implementation and dtype.
    """
    values = {name: tensor.detach().clone().requires_grad_(name in leaves) for name, tensor in inputs.items()}
    with PoisonedMemory():
        results = compute(values)
        products = [
            (result * machine.random(*(result.shape or (1,)), seed=seed).to(result.dtype)).sum()
            for seed, result in enumerate(results.values(), start=1)
            if result.requires_grad
        ]
        gradients = torch.autograd.grad(sum(products), [values[name] for name in leaves]) if leaves else ()
    named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in (results | named).items()}


def widen(inputs: Results) -> Results:
    """Return the inputs with floating-point numbers in float64."""
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def error_over_limit(results: Results, plain: Results, exact: Results, rounding: float = 0.0) -> tuple[float, str]:
    """Return the largest error over its limit, and the result that has it; infinity for what is not finite.

    The limit is twice the error of plain torch in the operation's dtype, and a rounding of the largest magnitude: half
    an epsilon of the result's dtype, at least `rounding`.
    """
    shares = {}
    for name, expected in exact.items():
        expected = expected.double()
        ours, usual = ((values[name].double() - expected).abs().max() for values in (results, plain))
        relative = max(torch.finfo(results[name].dtype).eps / 2, rounding)
        limit = 2 * usual + relative * expected.abs().max() + (ENTROPY_ROUNDING if name == "entropy" else 1e-30)
        shares[name] = float((ours / limit).nan_to_num(nan=torch.inf))
    worst = max(shares, key=lambda name: shares[name])
    return shares[worst], worst


def error_row(machine: Machine, stage: str, check: str, share: float, result: str) -> Row:
    """Return a row of an error over its limit, which names the result that has it."""
    row = machine.at_most(stage, check, share, 1)
    return dataclasses.replace(row, value=f"{row.value} ({result})")


def differing(first: Results, second: Results) -> int:
    """Return the number of results whose bits differ."""
    return sum(not torch.equal(first[name], second[name]) for name in first)
