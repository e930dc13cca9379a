"""What the engine must hold after a transfer, written with chunks and concatenations rather than rectangles."""

from __future__ import annotations

import torch
from torch import Tensor

from oreal_megatron.models import tensors
from oreal_megatron.models.architecture import Architecture


def numbered(arch: Architecture, dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    """Hugging Face tensors in which no two elements of the model are equal, beginning with 1."""
    weights, first = {}, 1
    for entry in tensors.entries(arch, 1, 1, 0, "lm"):
        for name, shape in tensors.hf_shapes(entry, arch).items():
            count = torch.Size(shape).numel()
            weights[name] = torch.arange(first, first + count).view(shape).to(dtype)
            first += count
    return weights


def held(arch: Architecture, weights: dict[str, Tensor], ranks: int, rank: int, parts: int, mine: list[int]) -> dict:
    """The trainer's shards of the stages `mine` out of `parts`, interleaved chunks counted as stages."""
    return {
        entry.megatron: tensors.shard(entry, tensors.to_megatron(entry, arch, weights.__getitem__), rank, ranks).clone()
        for part in mine
        for entry in tensors.entries(arch, ranks, parts, part, "lm")
    }


def engine(arch: Architecture, weights: dict[str, Tensor], ranks: int, rank: int) -> dict[str, Tensor]:
    """The parameters of one rank of vLLM, by its names; padding is zero."""
    names, size, found = arch.names, arch.head_dim, {}

    def vocabulary(name: str) -> Tensor:
        full = weights[name]
        padding = full.new_zeros(-len(full) % 64, full.shape[1])
        return torch.cat([full, padding]).chunk(ranks)[rank]

    def keys(full: Tensor) -> Tensor:
        repeated = full.unflatten(0, (arch.kv_groups, size)).repeat_interleave(max(ranks // arch.kv_groups, 1), 0)
        return repeated.flatten(0, 1).chunk(ranks)[rank]

    def qkv(layer: str, kind: str) -> Tensor:
        if len(names.qkv) == 3:
            query, key, value = (weights[f"{layer}{name}.{kind}"] for name in names.qkv)
        else:
            full = weights[f"{layer}{names.qkv[0]}.{kind}"]
            query, key, value = full.split([arch.heads * size, arch.kv_groups * size, arch.kv_groups * size])
        return torch.cat([query.chunk(ranks)[rank], keys(key), keys(value)])

    found[names.embedding] = vocabulary(names.embedding)
    for number in range(arch.layers):
        layer = f"{names.layer}{number}."
        fused = "attention.wqkv" if len(names.qkv) == 1 else "self_attn.qkv_proj"
        for kind in ["weight"] + ["bias"] * arch.qkv_bias:
            found[f"{layer}{fused}.{kind}"] = qkv(layer, kind)
        for name in (names.input_norm, names.mlp_norm, *((names.q_norm, names.k_norm) if arch.qk_norm else ())):
            found[layer + name] = weights[layer + name]
        for name in (names.proj, names.down):
            found[f"{layer}{name}.weight"] = weights[f"{layer}{name}.weight"].chunk(ranks, 1)[rank]
        both = [weights[f"{layer}{name}.weight"].chunk(ranks)[rank] for name in names.gate_up]
        found[layer + names.gate_up[0].split(".")[0] + ".gate_up_proj.weight"] = torch.cat(both)
    found[names.final_norm] = weights[names.final_norm]
    if not arch.tied:
        found[names.output] = vocabulary(names.output)
    return found
