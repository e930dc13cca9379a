"""How vLLM lays a dense decoder's parameters out on the ranks of a tensor-parallel engine, without importing vLLM.

`qkv_proj` holds the rank's queries, then its keys, then its values; `gate_up_proj` its gate, then its up. An engine of
more ranks than key-value groups repeats each group's key and value. InternLM2's one `wqkv` keeps its own order and is
cut in three as if it were queries, keys and values. The vocabulary is padded to a multiple of 64. Read from vLLM
0.31 (model_executor/layers/linear.py, vocab_parallel_embedding.py); tests/engine/test_engine.py compares with what its
loaders do, and a live engine of another layout is not written to.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from oreal_megatron.models.architecture import Architecture
from oreal_megatron.reshard.shards import Offset, Region, Shard

VOCABULARY_UNIT = 64


def padded_vocabulary(arch: Architecture) -> int:
    return -(-arch.vocab // VOCABULARY_UNIT) * VOCABULARY_UNIT


def shapes(arch: Architecture, ranks: int) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter on a rank, by vLLM's names."""
    found: dict[str, tuple[int, ...]] = {}
    for piece in pieces(arch, ranks, 0):
        name, row, column = piece.spot
        vector = piece.name.endswith(".bias") or "norm" in piece.name
        rows, columns = row + piece.rectangle.rows, column + piece.rectangle.columns
        found[name] = (rows,) if vector else (rows, columns)
    for name in (arch.names.embedding, arch.names.output):
        if name in found:
            found[name] = (padded_vocabulary(arch) // ranks, arch.hidden)
    return found


def pieces(arch: Architecture, ranks: int, rank: int) -> Iterator[Shard]:
    """What a rank of the engine holds, in the order of the layers. A tied output layer is the embedding itself."""
    yield _vocabulary(arch, arch.names.embedding, ranks, rank)
    for layer in range(arch.layers):
        yield from _layer(arch, f"{arch.names.layer}{layer}.", ranks, rank)
    yield _whole(arch.names.final_norm, arch.hidden)
    if not arch.tied:
        yield _vocabulary(arch, arch.names.output, ranks, rank)


def _layer(arch: Architecture, layer: str, ranks: int, rank: int) -> Iterator[Shard]:
    names, queries = arch.names, arch.heads * arch.head_dim
    yield _whole(layer + names.input_norm, arch.hidden)
    yield from _qkv(arch, layer, ".weight", arch.hidden, ranks, rank)
    if arch.qkv_bias:
        yield from _qkv(arch, layer, ".bias", 1, ranks, rank)
    if arch.qk_norm:
        yield _whole(layer + names.q_norm, arch.head_dim)
        yield _whole(layer + names.k_norm, arch.head_dim)
    yield _columns(layer + names.proj + ".weight", arch.hidden, queries, ranks, rank)
    yield _whole(layer + names.mlp_norm, arch.hidden)
    share = arch.ffn // ranks
    fused = layer + names.gate_up[0].rpartition(".")[0] + ".gate_up_proj.weight"
    for number, name in enumerate(names.gate_up):
        rectangle = Region(rank * share, 0, share, arch.hidden)
        yield Shard(f"{layer}{name}.weight", rectangle, Offset(fused, number * share, 0))
    yield _columns(layer + names.down + ".weight", arch.hidden, arch.ffn, ranks, rank)


def _qkv(arch: Architecture, layer: str, kind: str, columns: int, ranks: int, rank: int) -> Iterator[Shard]:
    size, repeats = arch.head_dim, max(ranks // arch.kv_groups, 1)
    queries, keys = arch.heads // ranks * size, max(arch.kv_groups // ranks, 1) * size
    firsts = (rank * queries, rank // repeats * keys, rank // repeats * keys)
    if len(arch.names.qkv) == 3:
        names, offsets = arch.names.qkv, (0, 0, 0)
        fused = layer + names[0].rpartition(".")[0] + ".qkv_proj" + kind
    else:
        names = arch.names.qkv * 3
        offsets = (0, arch.heads * size, (arch.heads + arch.kv_groups) * size)
        fused = layer + names[0] + kind
    row = 0
    for name, offset, first, count in zip(names, offsets, firsts, (queries, keys, keys), strict=True):
        yield Shard(layer + name + kind, Region(offset + first, 0, count, columns), Offset(fused, row, 0))
        row += count


def _whole(name: str, rows: int) -> Shard:
    return Shard(name, Region(0, 0, rows, 1), Offset(name, 0, 0))


def _columns(name: str, rows: int, columns: int, ranks: int, rank: int) -> Shard:
    share = columns // ranks
    return Shard(name, Region(0, rank * share, rows, share), Offset(name, 0, 0))


def _vocabulary(arch: Architecture, name: str, ranks: int, rank: int) -> Shard:
    share = padded_vocabulary(arch) // ranks
    first = min(rank * share, arch.vocab)
    return Shard(name, Region(first, 0, min(first + share, arch.vocab) - first, arch.hidden), Offset(name, 0, 0))


def mismatch(live: dict[str, Tensor], arch: Architecture, ranks: int) -> str:
    """What keeps an engine's parameters from being written to slice by slice; empty when nothing does."""
    if arch.experts:
        return "it has experts, which only its own loader places"
    wanted = shapes(arch, ranks)
    if odd := sorted(wanted.keys() ^ live.keys()):
        return f"its parameters are not those of this layout, beginning with {odd[0]}"
    for name, shape in wanted.items():
        if tuple(live[name].shape) != shape:
            return f"{name} has shape {tuple(live[name].shape)} in the engine, {shape} in this layout"
    if len(types := {tensor.dtype for tensor in live.values()}) > 1 or not next(iter(types)).is_floating_point:
        return f"its parameters are of the types {', '.join(sorted(map(str, types)))}"
    return ""
