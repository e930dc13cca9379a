"""Keys of tensors in Megatron's distributed checkpoints (torch_dist).

Layers of one kind are stacked along a first axis, their experts along a second one, and norms before a linear layer
carry that layer's name, as in Transformer Engine's fused layers. A checkpoint is thus
independent of the parallel layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from oreal_megatron.models.architecture import Architecture
from oreal_megatron.models.tensors import Entry

FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
EXPERTS = "mlp.experts.local_experts."  # prefix in a live model; the number of the expert follows
FEATURE_PROJECTION = "feature_projection"  # module of distillation beside the model, of which checkpoints only know


class StoredTensor(NamedTuple):
    """Location of a tensor in a checkpoint."""

    key: str
    indices: tuple[int, ...] = ()  # along the first axes of the stored tensor: layer, or layer and expert


def stored_tensor(entry: Entry) -> StoredTensor:
    """Return the stored tensor of an entry. A tied copy of the embedding is stored once, as the embedding."""
    if not entry.exported:
        return StoredTensor("embedding.word_embeddings.weight")
    parts = entry.megatron.split(".", 3)
    if parts[:2] != ["decoder", "layers"]:
        return StoredTensor(entry.megatron)
    layer, name = int(parts[2]), parts[3]
    if not name.startswith(EXPERTS):
        return StoredTensor("decoder.layers." + FUSED.get(name, name), (layer,))
    expert, name = name.removeprefix(EXPERTS).split(".", 1)
    return StoredTensor("decoder.layers.mlp.experts.experts." + name, (layer, int(expert)))


def stacked_axes(arch: Architecture, location: StoredTensor) -> tuple[int, ...]:
    """Return the lengths of the axes along which a stored tensor is stacked."""
    return (arch.layers, arch.experts.count if arch.experts else 1)[: len(location.indices)]


def extra_states(arch: Architecture) -> Iterator[str]:
    """Yield the keys of linear layers' `_extra_state`, which is empty outside Transformer Engine's 8-bit formats."""
    layers = (arch.layers,)
    feed_forward = ("mlp.experts.experts", (*layers, arch.experts.count)) if arch.experts else ("mlp", layers)
    for (module, axes), linear in ((("self_attention", layers), ("proj", "qkv")), (feed_forward, ("fc1", "fc2"))):
        for index in itertools.product(*map(range, axes)):
            shard = "_".join(".".join(map(str, numbers)) for numbers in (index, axes))
            yield from (f"decoder.layers.{module}.linear_{name}._extra_state/shard_{shard}" for name in linear)
