"""Where Megatron's distributed checkpoints (torch_dist) keep a tensor.

Layers of one kind are stacked along a first axis, and norms before a linear layer carry that layer's name, as in
Transformer Engine's fused layers; so a checkpoint does not depend on layout or layer implementation.
"""

from __future__ import annotations

from typing import NamedTuple

from oreal_megatron.mapping.tensors import Entry

FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# Linear layers have an `_extra_state` besides, which is empty outside Transformer Engine's 8-bit formats.
EXTRA_STATE = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


class Place(NamedTuple):
    key: str
    layer: int | None  # index along the first axis of the stored tensor; None: it is not stacked


def place(entry: Entry) -> Place:
    """The stored tensor of an entry. A tied copy of the embedding is stored once, as the embedding."""
    if not entry.exported:
        return Place("embedding.word_embeddings.weight", None)
    parts = entry.megatron.split(".", 3)
    if parts[:2] != ["decoder", "layers"]:
        return Place(entry.megatron, None)
    return Place("decoder.layers." + FUSED.get(parts[3], parts[3]), int(parts[2]))
