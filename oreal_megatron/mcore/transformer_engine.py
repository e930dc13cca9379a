"""Transformer Engine in Megatron's layer: its linear layers, those after a norm fused with it, and its attention.

Imported only where it is installed and asked for. Parameters keep the names of the fused modules; checkpoints are those
of the local layers, whose norms are stored under the same names (models/torch_dist_keys.py).
"""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import ModuleSpec
from torch import Tensor

from oreal_megatron.mcore import layers


class Attention(TEDotProductAttention):
    """Its attention by the borders of a packed micro-batch; rows are [S, 1, ...] outside, as for our own."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *other: Any, packed_seq_params: layers.Packed, **more: Any
    ) -> Tensor:
        """[S, 1, heads * d] from queries [S, 1, heads, d], keys and values [S, 1, groups, d]."""
        starts, key_starts, longest, longest_key = packed_seq_params.plan.borders
        packed = PackedSeqParams("thd", starts, key_starts, max_seqlen_q=longest, max_seqlen_kv=longest_key)
        rows = (each.squeeze(1) for each in (query, key, value))
        return super().forward(*rows, *other, packed_seq_params=packed, **more).reshape(len(query), 1, -1)


def layer(qk_norm: bool, experts: int | None) -> ModuleSpec:
    """Megatron's specification, less what a checkpoint of local layers would lack: states of norms that stand alone."""
    spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(experts, qk_layernorm=qk_norm)
    if experts:  # nothing to fuse the norm with, but local layers store it as if there were
        spec.submodules.pre_mlp_layernorm = layers.RMSNorm
        spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return spec
