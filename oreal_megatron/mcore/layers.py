"""Layers that replace Megatron's local ones, which refuse packed sequences, context or sequence parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import oreal_kernels
import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from oreal_megatron.mcore import context_parallel
from oreal_megatron.mcore.varlen_attention import AttentionPlan


@dataclass(frozen=True)
class PackedSequences:
    """Facts about a micro-batch for every layer; Megatron passes them on as `packed_seq_params`.

    Not Megatron's "thd" format, whose rotary embedding copies the lengths from the device in every layer.
    """

    positions: Tensor  # [S / cp] int64, each token's position in its sequence
    plan: AttentionPlan
    qkv_format: ClassVar[str] = "sbhd"
    cp_group: ClassVar[None] = None


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, its weight marked for the sum over ranks that sequence parallelism needs."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **other: Any):
        super().__init__(hidden_size, eps=eps)
        mark_sequence_parallel(self.weight, config.sequence_parallel)


def mark_sequence_parallel(weight: nn.Parameter, enabled: bool) -> None:
    """Mark a weight, as Megatron does, whose gradient is summed over the ranks of sequence parallelism."""
    weight.sequence_parallel = enabled  # type: ignore[attr-defined]  # Megatron's own mark


class PackedRotary(nn.Module):
    """Rotary embedding by the positions of a packed micro-batch; Megatron's counts rows instead.

    `fused`: for `fused_rotary`, which reads cosines and sines where Megatron computes them again in every layer.
    """

    def __init__(self, frequencies: Tensor, fused: bool):
        super().__init__()
        self.frequencies = frequencies  # [d / 2] float32, no buffer: a cast of the model must not round it
        self.fused = fused

    def get_rotary_seq_len(
        self, inference: Any, block: Any, hidden: Any, config: Any, packed: PackedSequences
    ) -> Tensor:
        """Return the positions; Megatron passes the result to `forward` and expects a length elsewhere."""
        return packed.positions

    def forward(self, positions: Tensor, **other: Any) -> Tensor:
        """Return [S, 1, 1, d] angles, twice each, or their cosines and then their sines."""
        angles = torch.outer(positions.float(), self.frequencies.to(positions.device))
        halves = [angles.cos(), angles.sin()] if self.fused else [angles, angles]
        return torch.cat(halves, -1)[:, None, None, :]


def fused_rotary(x: Tensor, cos_sin: Tensor, interleaved: bool = False) -> Tensor:
    """Return queries or keys [S, 1, heads, d] turned by [S, 1, 1, d] cosines and sines, as Megatron calls it."""
    if interleaved or x.shape[1] != 1:
        raise ValueError(f"fused_rotary is for halves and one pack; got interleaved={interleaved}, {list(x.shape)}")
    return oreal_kernels.rotary(x.squeeze(1), cos_sin[:, 0, 0])[:, None]


class PackedAttention(nn.Module):
    """Core attention within each packed sequence; keys and values are gathered over context-parallel ranks."""

    def __init__(self, config: TransformerConfig, *other: Any, **more: Any):
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *other: Any, packed_seq_params: PackedSequences, **more: Any
    ) -> Tensor:
        """Return [S, 1, heads * d] from queries [S, 1, heads, d], keys and values [S, 1, groups, d]."""
        key, value = context_parallel.gather_rows(torch.stack([key.squeeze(1), value.squeeze(1)], 1)).unbind(1)
        attended = packed_seq_params.plan.attend(query.squeeze(1), key, value)
        return attended.flatten(1)[:, None]
