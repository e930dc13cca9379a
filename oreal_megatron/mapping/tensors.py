"""Where each Megatron tensor comes from in a Hugging Face folder, and how it is cut over tensor-parallel ranks.

Formulas: shared/design/resharding.md section 4. Megatron's `linear_qkv` holds, for each key-value group, its query
heads, then its key, then its value; `linear_fc1` holds gate then up, in each shard separately.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from oreal_megatron.mapping.architecture import Architecture


class Cut(enum.Enum):
    """How tensor-parallel ranks share a tensor."""

    WHOLE = "every rank holds all of it"
    ROWS = "consecutive rows"
    VOCABULARY = "consecutive rows, after padding with zeros"
    COLUMNS = "consecutive columns"
    ROWS_OF_BOTH = "consecutive rows of each half (gate and up)"


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron tensor with its global layer number in the name, and the HF tensors it is made of."""

    megatron: str
    hf: tuple[str, ...]
    cut: Cut
    shape: tuple[int, ...]  # of the full Megatron tensor, vocabulary padding included
    exported: bool = True  # False: a copy that another stage exports

    def shard_shape(self, ranks: int) -> torch.Size:
        """Shape of what one of `ranks` tensor-parallel ranks holds."""
        rows, *columns = self.shape
        if self.cut is Cut.COLUMNS:
            columns[0] //= ranks
        elif self.cut is not Cut.WHOLE:
            rows //= ranks
        return torch.Size([rows, *columns])


def entries(arch: Architecture, tensor: int, stages: int, stage: int, head: str) -> Iterator[Entry]:
    """The tensors of one pipeline stage, in a fixed order. `head` is "lm" or "scalar" (token reward model)."""
    first, last = stage == 0, stage == stages - 1
    vocabulary = (arch.padded_vocab(tensor), arch.hidden)
    embedding = ("model.embed_tokens.weight",)
    if first:
        yield Entry("embedding.word_embeddings.weight", embedding, Cut.VOCABULARY, vocabulary)
    for layer in arch.stage_layers(stages, stage):
        yield from _layer(arch, layer)
    if last:
        yield Entry("decoder.final_layernorm.weight", ("model.norm.weight",), Cut.WHOLE, (arch.hidden,))
        if head == "scalar":
            yield Entry("output_layer.weight", ("score.weight",), Cut.WHOLE, (1, arch.hidden))
        elif not arch.tied:
            yield Entry("output_layer.weight", ("lm_head.weight",), Cut.VOCABULARY, vocabulary)
        elif not first:  # Megatron keeps a copy of the tied embedding on the last stage
            yield Entry("output_layer.weight", embedding, Cut.VOCABULARY, vocabulary, exported=False)


def _layer(arch: Architecture, layer: int) -> Iterator[Entry]:
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    hidden, queries = arch.hidden, arch.heads * arch.head_dim
    qkv = queries + 2 * arch.kv_groups * arch.head_dim

    def entry(megatron: str, hf: list[str], cut: Cut, *shape: int) -> Entry:
        return Entry(ours + megatron, tuple(theirs + name for name in hf), cut, shape)

    attention, mlp = "self_attention.linear_", "mlp.linear_"
    yield entry("input_layernorm.weight", ["input_layernorm.weight"], Cut.WHOLE, hidden)
    yield entry(attention + "qkv.weight", [f"self_attn.{x}_proj.weight" for x in "qkv"], Cut.ROWS, qkv, hidden)
    if arch.qkv_bias:
        yield entry(attention + "qkv.bias", [f"self_attn.{x}_proj.bias" for x in "qkv"], Cut.ROWS, qkv)
    yield entry(attention + "proj.weight", ["self_attn.o_proj.weight"], Cut.COLUMNS, hidden, queries)
    yield entry("pre_mlp_layernorm.weight", ["post_attention_layernorm.weight"], Cut.WHOLE, hidden)
    gate_up = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    yield entry(mlp + "fc1.weight", gate_up, Cut.ROWS_OF_BOTH, 2 * arch.ffn, hidden)
    yield entry(mlp + "fc2.weight", ["mlp.down_proj.weight"], Cut.COLUMNS, hidden, arch.ffn)


def to_megatron(entry: Entry, arch: Architecture, read: Callable[[str], Tensor]) -> Tensor:
    """The full Megatron tensor of an entry; `read` gives an HF tensor by name."""
    parts = [read(name) for name in entry.hf]
    if len(parts) == 3:
        grouped = [part.unflatten(0, (arch.kv_groups, -1)) for part in parts]
        return torch.cat(grouped, 1).flatten(0, 1)
    full = torch.cat(parts)
    if entry.cut is Cut.VOCABULARY:
        full = torch.cat([full, full.new_zeros(entry.shape[0] - len(full), *full.shape[1:])])
    return full


def to_hf(entry: Entry, arch: Architecture, full: Tensor) -> dict[str, Tensor]:
    """The HF tensors of a full Megatron tensor."""
    if len(entry.hf) == 3:
        queries = arch.heads // arch.kv_groups * arch.head_dim
        grouped = full.unflatten(0, (arch.kv_groups, -1)).split([queries, arch.head_dim, arch.head_dim], 1)
        return {name: part.flatten(0, 1) for name, part in zip(entry.hf, grouped, strict=True)}
    if len(entry.hf) == 2:
        return dict(zip(entry.hf, full.chunk(2), strict=True))
    return {entry.hf[0]: full[: arch.vocab] if entry.cut is Cut.VOCABULARY else full}


def shard(entry: Entry, full: Tensor, rank: int, ranks: int) -> Tensor:
    """The part of a full Megatron tensor that one tensor-parallel rank holds."""
    if entry.cut is Cut.WHOLE:
        return full
    if entry.cut is Cut.COLUMNS:
        return full.chunk(ranks, 1)[rank]
    if entry.cut is Cut.ROWS_OF_BOTH:
        return torch.cat([half.chunk(ranks)[rank] for half in full.chunk(2)])
    return full.chunk(ranks)[rank]


def unshard(entry: Entry, shards: list[Tensor]) -> Tensor:
    """The full Megatron tensor from the shards of all tensor-parallel ranks, in rank order."""
    if entry.cut is Cut.WHOLE:
        return shards[0]
    if entry.cut is Cut.COLUMNS:
        return torch.cat(shards, 1)
    if entry.cut is Cut.ROWS_OF_BOTH:
        return torch.cat([torch.cat(halves) for halves in zip(*(shard.chunk(2) for shard in shards), strict=True)])
    return torch.cat(shards)
