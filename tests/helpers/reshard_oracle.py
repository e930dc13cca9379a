"""Oracle of resharding: the expected parameters after a transfer, by chunks and concatenations, not by regions."""

from __future__ import annotations

import torch
from torch import Tensor

from oreal_megatron.models import tensors
from oreal_megatron.models.architecture import Architecture


def numbered(arch: Architecture, dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    """Return Hugging Face tensors in which no two elements of the model are equal, beginning with 1."""
    weights, first = {}, 1
    for entry in tensors.entries(arch, 1, 1, 0, "lm"):
        for name, shape in tensors.hf_shapes(entry, arch).items():
            count = torch.Size(shape).numel()
            weights[name] = torch.arange(first, first + count).view(shape).to(dtype)
            first += count
    return weights


def trainer_tensors(
    arch: Architecture, weights: dict[str, Tensor], ranks: int, rank: int, stages: int, own_stages: list[int]
) -> dict[str, Tensor]:
    """Return the trainer's shards of `own_stages` out of `stages`, interleaved chunks counted as stages."""
    return {
        entry.megatron: tensors.shard(entry, tensors.to_megatron(entry, arch, weights.__getitem__), rank, ranks).clone()
        for stage in own_stages
        for entry in tensors.entries(arch, ranks, stages, stage, "lm")
    }


def engine_parameters(arch: Architecture, weights: dict[str, Tensor], ranks: int, rank: int) -> dict[str, Tensor]:
    """Return the parameters of one rank of vLLM, by its names; padding is zero."""
    names, size, parameters = arch.names, arch.head_dim, {}

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

    parameters[names.embedding] = vocabulary(names.embedding)
    for number in range(arch.layers):
        layer = f"{names.layer}{number}."
        fused = "attention.wqkv" if len(names.qkv) == 1 else "self_attn.qkv_proj"
        for kind in ["weight"] + ["bias"] * arch.qkv_bias:
            parameters[f"{layer}{fused}.{kind}"] = qkv(layer, kind)
        for name in (names.input_norm, names.mlp_norm, *((names.q_norm, names.k_norm) if arch.qk_norm else ())):
            parameters[layer + name] = weights[layer + name]
        for name in (names.proj, names.down):
            parameters[f"{layer}{name}.weight"] = weights[f"{layer}{name}.weight"].chunk(ranks, 1)[rank]
        both = [weights[f"{layer}{name}.weight"].chunk(ranks)[rank] for name in names.gate_up]
        parameters[layer + names.gate_up[0].split(".")[0] + ".gate_up_proj.weight"] = torch.cat(both)
    parameters[names.final_norm] = weights[names.final_norm]
    if not arch.tied:
        parameters[names.output] = vocabulary(names.output)
    return parameters
