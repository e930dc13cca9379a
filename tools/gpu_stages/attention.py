"""Stage of tools/gpu_acceptance.py: attention over packed sequences on one GPU, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_stages.comparison import Results, error_over_limit, error_row
from gpu_stages.machine import FAILED, NOT_JUDGED, PASSED, Machine, Row
from oreal_megatron.mcore import varlen_attention
from oreal_megatron.mcore.varlen_attention import AttentionPlan, segments

NAMES = ("query", "key", "value")
Heads = tuple[int, int, int]  # heads, groups, width


def attention(machine: Machine) -> Iterator[Row]:
    """Packed attention: errors against float64, the kernel that serves it, speed and growth of memory."""
    shapes: tuple[Heads, ...] = ((4, 2, 16), (3, 1, 16)) if machine.dry else ((28, 4, 128), (7, 1, 128))
    for shape in shapes:
        yield from _errors(machine, shape)
    yield from _speed(machine, shapes[0])


def _errors(machine: Machine, shape: Heads) -> Iterator[Row]:
    """Yield the errors of one long sequence and of several, of all rows and of the shares of two ranks."""
    tokens = 96 if machine.dry else 16384
    mixed = [0, tokens // 3, tokens // 3 + 1, tokens // 2, tokens - 5, tokens]  # the last one is a filler
    for name, offsets in (("one sequence", [0, tokens]), ("mixed sequences and a filler", mixed)):
        inputs = _inputs(machine, tokens, shape)
        exact, plain = (one_by_one(*inputs, offsets, dtype) for dtype in (torch.float64, torch.bfloat16))
        quarters = [range(first, first + tokens // 4) for first in range(0, tokens, tokens // 4)]
        ranks = [quarters[0], quarters[3]], [quarters[1], quarters[2]]  # as Megatron's context parallelism splits
        for rows, shares in (("all rows", [[range(tokens)]]), ("two context-parallel ranks", ranks)):
            share, worst = error_over_limit(by_shares(*inputs, offsets, shares), plain, exact)
            check = f"{name}, {shape[0]} heads in {shape[1]} groups, {rows}: largest error over its limit"
            yield error_row(machine, "attention", check, share, worst)


def by_shares(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, offsets: Sequence[int], shares: Sequence[Sequence[range]]
) -> Results:
    """Return output and gradients by the plans of ranks that hold these rows; those of keys and values are sums."""
    output, query_gradient, key_gradient, value_gradient = (
        torch.zeros_like(x, dtype=torch.float32) for x in (q, q, k, v)
    )
    for chunks in shares:
        rows = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks]).to(q.device)
        leaves = [x.clone().requires_grad_() for x in (q[rows], k, v)]
        attended = AttentionPlan(segments(offsets, chunks), q.device).attend(*leaves)
        gradients = torch.autograd.grad(attended, leaves, gradient[rows])
        output[rows], query_gradient[rows] = attended.detach().float(), gradients[0].float()
        key_gradient += gradients[1]
        value_gradient += gradients[2]
    return _named(*(x.to(q.dtype) for x in (output, query_gradient, key_gradient, value_gradient)))


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, offsets: Sequence[int], dtype: torch.dtype
) -> Results:
    """Return output and gradients by torch, for each sequence and head alone in `dtype`; sums are in float64."""
    totals = [torch.zeros_like(x, dtype=torch.float64) for x in (q, q, k, v)]
    each = q.shape[1] // k.shape[1]
    for (start, stop), head in itertools.product(itertools.pairwise(offsets), range(q.shape[1])):
        rows, numbers = slice(start, stop), (head, head // each, head // each)
        pairs = zip((q, k, v), numbers, strict=True)
        leaves = [x[rows, number].to(dtype, copy=True).requires_grad_() for x, number in pairs]
        attended = F.scaled_dot_product_attention(*(leaf[None, None] for leaf in leaves), is_causal=True)[0, 0]
        parts = attended.detach(), *torch.autograd.grad(attended, leaves, gradient[rows, head].to(dtype))
        for total, part, number in zip(totals, parts, (head, *numbers), strict=True):
            total[rows, number] += part
    return _named(*totals)


def _speed(machine: Machine, shape: Heads) -> Iterator[Row]:
    """Yield the kernels that serve one long sequence, their speed, and memory at twice the length."""
    lengths, peaks = (128, 256) if machine.dry else (8192, 16384), []
    for length in lengths:
        q, k, v, gradient = _inputs(machine, length, shape)
        plan = AttentionPlan(segments([0, length], [range(length)]), machine.device)
        leaves = [x.requires_grad_() for x in (q, k, v)]

        def forward(plan: AttentionPlan = plan, leaves: list[Tensor] = leaves) -> Tensor:
            return plan.attend(*leaves)

        def both(leaves: list[Tensor] = leaves, gradient: Tensor = gradient) -> None:
            torch.autograd.grad(forward(), leaves, gradient)

        peaks.append(machine.peak_bytes(both))
    yield from _kernels(machine, forward, both)
    first, total = machine.seconds(forward), machine.seconds(both)
    operations = lengths[1] ** 2 * shape[0] * shape[2]  # of a product of which half is masked
    name = f"one sequence of {lengths[1]}"
    yield machine.at_least("attention", f"forward, {name}", 2 * operations / first / 1e12, 300, "TFLOP/s")
    backward = 5 * operations / max(total - first, 1e-9) / 1e12
    yield machine.measured("attention", f"backward, {name}", backward, "TFLOP/s")
    yield machine.at_most("attention", "memory at twice the length", peaks[1] / max(peaks[0], 1), 2.2, speed=True)


def _kernels(machine: Machine, forward: Callable[[], object], both: Callable[[], object]) -> Iterator[Row]:
    """Yield whether torch offers attention of variable length here, and the kernels that ran longest."""
    kernel = varlen_attention.use_fastest_kernel(machine.device) or "FlashAttention 2"
    offered = varlen_attention.causal_options(varlen_attention.varlen_attn) is not None
    yield Row("attention", "kernel", kernel if not machine.dry else "padded", "variable-length flash attention",
              NOT_JUDGED if machine.dry else PASSED if offered else FAILED)  # fmt: skip
    for name, function in (("forward", forward), ("forward and backward", both)):
        check = f"longest kernel, {name}"
        yield Row("attention", check, longest_kernel(machine, function), "measured", NOT_JUDGED)


def longest_kernel(machine: Machine, function: Callable[[], object]) -> str:
    """Return the name of the kernel that a call spends most time in; of the operation in a dry run."""
    activity = torch.profiler.ProfilerActivity.CPU if machine.dry else torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        function()
        machine.synchronize()
    time = "self_cpu_time_total" if machine.dry else "self_device_time_total"
    events = sorted(profile.key_averages(), key=lambda event: getattr(event, time))
    return events[-1].key[:100] if events else "none was recorded"


def _inputs(machine: Machine, tokens: int, shape: Heads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values and the gradient of the output."""
    heads, groups, width = shape
    counts = (heads, groups, groups, heads)
    q, k, v, gradient = (machine.random(tokens, count, width, seed=seed) for seed, count in enumerate(counts))
    return q, k, v, gradient


def _named(output: Tensor, *gradients: Tensor) -> Results:
    return {"output": output} | dict(zip((f"gradient of {name}" for name in NAMES), gradients, strict=True))
