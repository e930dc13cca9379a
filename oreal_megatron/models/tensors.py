"""Mapping of Megatron tensors to those of a Hugging Face folder, and their split over tensor-parallel ranks.

Megatron's `linear_qkv` holds, for each key-value group, its query
heads, then its key, then its value; `linear_fc1` holds gate then up, in each shard separately. Where
there are more ranks than key-value groups, Megatron's ranks hold parts of a group and gather their activations.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from oreal_megatron.models.architecture import Architecture


class Sharding(enum.Enum):
    """Split of a tensor over tensor-parallel ranks."""

    REPLICATED = "every rank holds all of it"
    ROWS = "consecutive rows"
    VOCABULARY = "consecutive rows, after padding with zeros"
    COLUMNS = "consecutive columns"
    ROWS_OF_BOTH = "consecutive rows of each half (gate and up)"


@dataclass(frozen=True, slots=True)
class TensorBlock:
    """Rectangle of a tensor: its start and size in every dimension."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    def select(self, full: Tensor) -> Tensor:
        """Return the view of `full` that this region covers."""
        return full[tuple(slice(first, first + count) for first, count in zip(self.start, self.size, strict=True))]


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron tensor with its global layer number in the name, and the Hugging Face tensors it consists of."""

    megatron: str
    hf: tuple[str, ...]
    sharding: Sharding
    shape: tuple[int, ...]  # of the full Megatron tensor, vocabulary padding included
    exported: bool = True  # False: a copy that another stage exports

    def shard_shape(self, ranks: int) -> torch.Size:
        """Return the shape of the shard of one of `ranks` tensor-parallel ranks."""
        rows, *columns = self.shape
        if self.sharding is Sharding.COLUMNS:
            columns[0] //= ranks
        elif self.sharding is not Sharding.REPLICATED:
            rows //= ranks
        return torch.Size([rows, *columns])

    def regions(self, rank: int, ranks: int) -> list[TensorBlock]:
        """Return the regions that one rank's shard consists of, from top to bottom."""
        size = tuple(self.shard_shape(ranks))
        if self.sharding is Sharding.REPLICATED:
            return [TensorBlock((0,) * len(size), size)]
        if self.sharding is Sharding.COLUMNS:
            return [TensorBlock((0, rank * size[1]), size)]
        if self.sharding is Sharding.ROWS_OF_BOTH:
            half = (size[0] // 2, *size[1:])
            return [TensorBlock((first + rank * half[0], 0), half) for first in (0, self.shape[0] // 2)]
        return [TensorBlock((rank * size[0],) + (0,) * (len(size) - 1), size)]


def entries(arch: Architecture, tensor: int, stages: int, stage: int, head: str) -> Iterator[Entry]:
    """Yield the tensors of one pipeline stage, in a fixed order. `head` is "lm" or "scalar" (token reward model).

    Interleaved chunks count as stages: chunk c of stage s is stage c * (number of stages) + s of all of them.
    """
    first, last, names = stage == 0, stage == stages - 1, arch.names
    vocabulary = (arch.padded_vocab(tensor), arch.hidden)
    if first:
        yield Entry("embedding.word_embeddings.weight", (names.embedding,), Sharding.VOCABULARY, vocabulary)
    for layer in arch.stage_layers(stages, stage):
        yield from _layer(arch, layer)
    if last:
        yield Entry("decoder.final_layernorm.weight", (names.final_norm,), Sharding.REPLICATED, (arch.hidden,))
        if head == "scalar":
            yield Entry("output_layer.weight", (names.score + ".weight",), Sharding.REPLICATED, (1, arch.hidden))
        elif not arch.tied:
            yield Entry("output_layer.weight", (names.output,), Sharding.VOCABULARY, vocabulary)
        elif not first:  # Megatron keeps a copy of the tied embedding on the last stage
            yield Entry("output_layer.weight", (names.embedding,), Sharding.VOCABULARY, vocabulary, exported=False)


def _layer(arch: Architecture, layer: int) -> Iterator[Entry]:
    """Yield the tensors of one layer."""
    megatron_prefix, hf_prefix, names = f"decoder.layers.{layer}.", f"{arch.names.layer}{layer}.", arch.names
    hidden, queries = arch.hidden, arch.heads * arch.head_dim
    qkv = queries + 2 * arch.kv_groups * arch.head_dim

    def entry(megatron: str, hf: tuple[str, ...], sharding: Sharding, *shape: int) -> Entry:
        return Entry(megatron_prefix + megatron, tuple(hf_prefix + name for name in hf), sharding, shape)

    def weights(linear: tuple[str, ...], kind: str = "weight") -> tuple[str, ...]:
        return tuple(f"{name}.{kind}" for name in linear)

    attention = "self_attention.linear_"
    yield entry("input_layernorm.weight", (names.input_norm,), Sharding.REPLICATED, hidden)
    yield entry(attention + "qkv.weight", weights(names.qkv), Sharding.ROWS, qkv, hidden)
    if arch.qkv_bias:
        yield entry(attention + "qkv.bias", weights(names.qkv, "bias"), Sharding.ROWS, qkv)
    if arch.qk_norm:
        yield entry("self_attention.q_layernorm.weight", (names.q_norm,), Sharding.REPLICATED, arch.head_dim)
        yield entry("self_attention.k_layernorm.weight", (names.k_norm,), Sharding.REPLICATED, arch.head_dim)
    yield entry(attention + "proj.weight", weights((names.proj,)), Sharding.COLUMNS, hidden, queries)
    yield entry("pre_mlp_layernorm.weight", (names.mlp_norm,), Sharding.REPLICATED, hidden)
    if arch.experts:
        yield entry("mlp.router.weight", (names.router,), Sharding.REPLICATED, arch.experts.count, hidden)
    for mlp, gate_up, down in _blocks(arch):
        yield entry(mlp + "linear_fc1.weight", weights(gate_up), Sharding.ROWS_OF_BOTH, 2 * arch.ffn, hidden)
        yield entry(mlp + "linear_fc2.weight", weights((down,)), Sharding.COLUMNS, hidden, arch.ffn)


def _blocks(arch: Architecture) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yield Megatron's prefix and the HF names (gate and up, down) of each feed-forward block or expert."""
    names = arch.names
    if not arch.experts:
        yield "mlp.", names.gate_up, names.down
        return
    for number in range(arch.experts.count):
        gate_up = tuple(name.format(number) for name in names.gate_up)
        yield f"mlp.experts.local_experts.{number}.", gate_up, names.down.format(number)


def hf_shapes(entry: Entry, arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the HF tensors of an entry."""
    rows, *columns = entry.shape
    if len(entry.hf) == 3:
        parts = [arch.heads * arch.head_dim] + [arch.kv_groups * arch.head_dim] * 2
    elif entry.sharding is Sharding.VOCABULARY:
        parts = [arch.vocab]
    else:
        parts = [rows // len(entry.hf)] * len(entry.hf)
    return {name: (part, *columns) for name, part in zip(entry.hf, parts, strict=True)}


def to_megatron(entry: Entry, arch: Architecture, read: Callable[[str], Tensor]) -> Tensor:
    """Return the full Megatron tensor of an entry; `read` returns an HF tensor by name."""
    parts = [read(name) for name in entry.hf]
    if len(parts) == 3:
        grouped = [part.unflatten(0, (arch.kv_groups, -1)) for part in parts]
        return torch.cat(grouped, 1).flatten(0, 1)
    full = torch.cat(parts) if len(parts) > 1 else parts[0]
    if entry.sharding is Sharding.VOCABULARY:
        full = torch.cat([full, full.new_zeros(entry.shape[0] - len(full), *full.shape[1:])])
    return full


def to_hf(entry: Entry, arch: Architecture, full: Tensor) -> dict[str, Tensor]:
    """Return the HF tensors of a full Megatron tensor."""
    if len(entry.hf) == 3:
        queries = arch.heads // arch.kv_groups * arch.head_dim
        grouped = full.unflatten(0, (arch.kv_groups, -1)).split([queries, arch.head_dim, arch.head_dim], 1)
        return {name: part.flatten(0, 1) for name, part in zip(entry.hf, grouped, strict=True)}
    if len(entry.hf) == 2:
        return dict(zip(entry.hf, full.chunk(2), strict=True))
    return {entry.hf[0]: full[: arch.vocab] if entry.sharding is Sharding.VOCABULARY else full}


def shard(entry: Entry, full: Tensor, rank: int, ranks: int) -> Tensor:
    """Return the shard of a full Megatron tensor that one tensor-parallel rank holds."""
    parts = [region.select(full) for region in entry.regions(rank, ranks)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def unshard(entry: Entry, shards: list[Tensor]) -> Tensor:
    """Return the full Megatron tensor from the shards of all tensor-parallel ranks, in rank order."""
    if entry.sharding is Sharding.REPLICATED:
        return shards[0]
    full = shards[0].new_empty(entry.shape)
    for rank, local in enumerate(shards):
        regions = entry.regions(rank, len(shards))
        for region, part in zip(regions, local.chunk(len(regions)), strict=True):
            region.select(full).copy_(part)
    return full
