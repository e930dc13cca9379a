"""Transformer Engine's modules in Megatron's layer: linear layers, those after a norm fused with it, and attention.

Imported only where it is installed and configured. Parameters keep the names of the fused modules; checkpoints are
those of the local layers, whose norms are stored under the same names (models/torch_dist_keys.py).
"""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import ModuleSpec
from torch import Tensor

from oreal_megatron.mcore.layers import PackedSequences, RMSNorm


class Attention(TEDotProductAttention):
    """Transformer Engine's attention by the offsets of a packed micro-batch; outside, rows are [S, 1, ...] as ours."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *other: Any, packed_seq_params: PackedSequences, **more: Any
    ) -> Tensor:
        """Return [S, 1, heads * d] from queries [S, 1, heads, d], keys and values [S, 1, groups, d]."""
        query_offsets, key_offsets, longest_query, longest_key = packed_seq_params.plan.offsets
        packed = PackedSeqParams(
            "thd", query_offsets, key_offsets, max_seqlen_q=longest_query, max_seqlen_kv=longest_key
        )
        rows = (tensor.squeeze(1) for tensor in (query, key, value))
        return super().forward(*rows, *other, packed_seq_params=packed, **more).reshape(len(query), 1, -1)


def layer_spec(qk_norm: bool, experts: int | None) -> ModuleSpec:
    """Return Megatron's specification without the state of separate norms, which local checkpoints do not contain."""
    spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(experts, qk_layernorm=qk_norm)
    if experts:  # there is no linear layer to fuse the norm with, but local layers store it as if there were one
        spec.submodules.pre_mlp_layernorm = RMSNorm
        spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return spec
