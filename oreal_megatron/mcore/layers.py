"""Modules of our own where Megatron's local ones refuse packed sequences, context or sequence parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import layers as linear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from oreal_kernels import gemm
from torch import Tensor, nn

from oreal_megatron.config import Config, ConfigError
from oreal_megatron.mcore import context_parallel
from oreal_megatron.mcore.varlen_attention import AttentionPlan
from oreal_megatron.models.architecture import Architecture


@dataclass(frozen=True)
class Packed:
    """What the layers have to know of a micro-batch; Megatron hands it to each of them as its packed_seq_params.

    Not Megatron's "thd" format, whose rotary embedding asks the device for the lengths in every layer.
    """

    positions: Tensor  # [S / cp] int64, each token's place in its sequence
    plan: AttentionPlan
    qkv_format: ClassVar[str] = "sbhd"
    cp_group: ClassVar[None] = None


class RMSNorm(nn.RMSNorm):
    """torch's, with its weight marked for the sum over ranks that sequence parallelism needs."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **other: Any):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


class Rotary(nn.Module):
    """Rotary embedding by the positions of a packed micro-batch, in place of Megatron's by the row."""

    def __init__(self, frequencies: Tensor):
        super().__init__()
        self.frequencies = frequencies  # [d / 2] float32, no buffer: a cast of the model must not round it

    def get_rotary_seq_len(self, inference: Any, block: Any, hidden: Any, config: Any, packed: Packed) -> Tensor:
        """What Megatron hands on to `forward`: elsewhere a length, here the positions."""
        return packed.positions

    def forward(self, positions: Tensor, **other: Any) -> Tensor:
        """[S, 1, 1, d] angles."""
        angles = torch.outer(positions.float(), self.frequencies.to(positions.device))
        return torch.cat([angles, angles], -1)[:, None, None, :]


class PackedAttention(nn.Module):
    """Core attention within each packed sequence; keys and values are gathered over context-parallel ranks."""

    def __init__(self, config: TransformerConfig, *other: Any, **more: Any):
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *other: Any, packed_seq_params: Packed, **more: Any
    ) -> Tensor:
        """[S, 1, heads * d] from queries [S, 1, heads, d], keys and values [S, 1, groups, d]."""
        key, value = context_parallel.gathered(torch.stack([key.squeeze(1), value.squeeze(1)], 1)).unbind(1)
        attended = packed_seq_params.plan.attend(query.squeeze(1), key, value)
        return attended.flatten(1)[:, None]


class WeightGradient:
    """Megatron adds gradients of linear layers to fp32 buffers through apex's extension; without apex, through this.

    The product comes out in fp32, nothing is rounded to bf16 in between, and no gradient exists beside the buffer.
    """

    @staticmethod
    def wgrad_gemm_accum_fp32(rows: Tensor, gradient: Tensor, main_grad: Tensor) -> None:
        """main_grad [out, in] += gradient [n, out]^T rows [n, in]."""
        gemm.add_weight_gradient(gradient, rows, main_grad)


if not linear._grad_accum_fusion_available:
    linear.fused_weight_gradient_mlp_cuda, linear._grad_accum_fusion_available = WeightGradient, True


def layer(arch: Architecture, config: Config) -> ModuleSpec:
    """Megatron's transformer layer with our norms and core attention, or with Transformer Engine's fused modules."""
    experts = arch.experts.count if arch.experts else None
    if config.model.layers == "local":
        spec = gpt_layer_specs.get_gpt_layer_local_spec(experts, qk_layernorm=arch.qk_norm, normalization="RMSNorm")
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        attention = PackedAttention
    else:
        if not gpt_layer_specs.HAVE_TE:
            raise ConfigError(
                'model.layers is "transformer_engine", but Transformer Engine cannot be imported here; install '
                'transformer-engine[pytorch], or set model.layers to "local"'
            )
        from oreal_megatron.mcore import transformer_engine

        spec = transformer_engine.layer(arch.qk_norm, experts)
        # Under context parallelism Transformer Engine cuts every sequence by itself, we cut the whole pack.
        attention = transformer_engine.Attention if config.parallel.context == 1 else PackedAttention
    inner = spec.submodules.self_attention.submodules
    inner.core_attention = attention
    if arch.qk_norm:
        inner.q_layernorm = inner.k_layernorm = RMSNorm
    return spec
