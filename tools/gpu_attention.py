"""Stage of tools/gpu_acceptance.py: attention over packed sequences on one GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from gpu_machine import FAILED, NOT_JUDGED, PASSED, Machine, Row, error
from torch import Tensor

from oreal_megatron.mcore import varlen_attention


def attention(machine: Machine) -> Iterator[Row]:
    """Packed attention: error against float64, speed and growth of memory, and the kernel that serves it."""
    heads, groups, width = (4, 2, 16) if machine.dry else (28, 4, 128)
    tokens = 96 if machine.dry else 2048
    offsets = [0, tokens // 3, tokens // 2, tokens]
    plan = varlen_attention.AttentionPlan(varlen_attention.segments(offsets, [range(tokens)]), machine.device)
    q, k, v = (machine.random(tokens, count, width) for count in (heads, groups, groups))
    exact, plain = (
        torch.cat([_one_sequence(q, k, v, slice(*pair), dtype) for pair in itertools.pairwise(offsets)])
        for dtype in (torch.float64, torch.bfloat16)
    )
    limit = 2 * error(plain, exact) + 1e-7
    yield machine.at_most("attention", "error, three sequences", error(plan.attend(q, k, v), exact), limit)
    kernel = varlen_attention.use_fastest_kernel(machine.device) or "FlashAttention 2"
    offered = varlen_attention.causal_options(varlen_attention.varlen_attn) is not None
    yield Row("attention", "kernel", kernel if not machine.dry else "padded", "variable-length flash attention",
              NOT_JUDGED if machine.dry else PASSED if offered else FAILED)  # fmt: skip
    lengths = (128, 256) if machine.dry else (8192, 16384)
    peaks = []
    for length in lengths:
        long = varlen_attention.AttentionPlan(varlen_attention.segments([0, length], [range(length)]), machine.device)
        q, k, v = (machine.random(length, count, width) for count in (heads, groups, groups))
        peaks.append(machine.peak_bytes(lambda q=q, k=k, v=v, long=long: long.attend(q, k, v)))
    seconds = machine.seconds(lambda: long.attend(q, k, v))
    speed = 2 * lengths[1] ** 2 * heads * width / seconds / 1e12  # two products, half of each masked
    yield machine.at_least("attention", f"forward, one sequence of {lengths[1]}", speed, 300, "TFLOP/s")
    yield machine.at_most("attention", "memory at twice the length", peaks[1] / max(peaks[0], 1), 2.2, speed=True)


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    each = q.shape[1] // k.shape[1]
    query, key, value = (x[rows].to(dtype).transpose(0, 1) for x in (q, k, v))
    key, value = key.repeat_interleave(each, 0), value.repeat_interleave(each, 0)
    return F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0].transpose(0, 1)
