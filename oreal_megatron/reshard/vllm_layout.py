"""Parameters of a dense decoder in vLLM: their shards on the ranks of a tensor-parallel engine, without importing vLLM.

`qkv_proj` holds the rank's queries, then its keys, then its values; `gate_up_proj` its gate, then its up. An engine of
more ranks than key-value groups repeats each group's key and value. InternLM2's one `wqkv` keeps its own order and is
cut in three as if it were queries, keys and values. The vocabulary is padded to a multiple of 64. Source: vLLM 0.31,
model_executor/layers/linear.py and vocab_parallel_embedding.py. tests/engine/test_engine.py compares with the result of
vLLM's own loaders; parameters of an engine with another layout are never written directly.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from oreal_megatron.models.architecture import Architecture
from oreal_megatron.reshard.shards import Offset, Region, Shard

VOCABULARY_UNIT = 64


def padded_vocabulary(arch: Architecture) -> int:
    """Return the number of rows of vLLM's embedding."""
    return -(-arch.vocab // VOCABULARY_UNIT) * VOCABULARY_UNIT


def parameter_shapes(arch: Architecture, ranks: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a rank by vLLM's names, for an engine of `ranks` ranks."""
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in engine_shards(arch, ranks, 0):
        name, row, column = shard.offset
        is_vector = shard.name.endswith(".bias") or "norm" in shard.name
        rows, columns = row + shard.region.rows, column + shard.region.columns
        shapes[name] = (rows,) if is_vector else (rows, columns)
    for name in (arch.names.embedding, arch.names.output):
        if name in shapes:
            shapes[name] = (padded_vocabulary(arch) // ranks, arch.hidden)
    return shapes


def engine_shards(arch: Architecture, ranks: int, rank: int) -> Iterator[Shard]:
    """Yield the shards of one rank of the engine, layer by layer. A tied output layer is the embedding itself."""
    yield _vocabulary_shard(arch, arch.names.embedding, ranks, rank)
    for layer in range(arch.layers):
        yield from _layer_shards(arch, f"{arch.names.layer}{layer}.", ranks, rank)
    yield _replicated_shard(arch.names.final_norm, arch.hidden)
    if not arch.tied:
        yield _vocabulary_shard(arch, arch.names.output, ranks, rank)


def _layer_shards(arch: Architecture, layer: str, ranks: int, rank: int) -> Iterator[Shard]:
    names, queries = arch.names, arch.heads * arch.head_dim
    yield _replicated_shard(layer + names.input_norm, arch.hidden)
    yield from _qkv_shards(arch, layer, ".weight", arch.hidden, ranks, rank)
    if arch.qkv_bias:
        yield from _qkv_shards(arch, layer, ".bias", 1, ranks, rank)
    if arch.qk_norm:
        yield _replicated_shard(layer + names.q_norm, arch.head_dim)
        yield _replicated_shard(layer + names.k_norm, arch.head_dim)
    yield _column_shard(layer + names.proj + ".weight", arch.hidden, queries, ranks, rank)
    yield _replicated_shard(layer + names.mlp_norm, arch.hidden)
    share = arch.ffn // ranks
    fused = layer + names.gate_up[0].rpartition(".")[0] + ".gate_up_proj.weight"
    for number, name in enumerate(names.gate_up):
        region = Region(rank * share, 0, share, arch.hidden)
        yield Shard(f"{layer}{name}.weight", region, Offset(fused, number * share, 0))
    yield _column_shard(layer + names.down + ".weight", arch.hidden, arch.ffn, ranks, rank)


def _qkv_shards(arch: Architecture, layer: str, kind: str, columns: int, ranks: int, rank: int) -> Iterator[Shard]:
    head, repeats = arch.head_dim, max(ranks // arch.kv_groups, 1)
    query_rows, key_rows = arch.heads // ranks * head, max(arch.kv_groups // ranks, 1) * head
    first_rows = (rank * query_rows, rank // repeats * key_rows, rank // repeats * key_rows)
    names: tuple[str, ...]
    if len(arch.names.qkv) == 3:
        names, starts = arch.names.qkv, (0, 0, 0)
        fused = layer + names[0].rpartition(".")[0] + ".qkv_proj" + kind
    else:
        names = arch.names.qkv * 3
        starts = (0, arch.heads * head, (arch.heads + arch.kv_groups) * head)
        fused = layer + names[0] + kind
    row = 0
    for name, start, first, rows in zip(names, starts, first_rows, (query_rows, key_rows, key_rows), strict=True):
        yield Shard(layer + name + kind, Region(start + first, 0, rows, columns), Offset(fused, row, 0))
        row += rows


def _replicated_shard(name: str, rows: int) -> Shard:
    return Shard(name, Region(0, 0, rows, 1), Offset(name, 0, 0))


def _column_shard(name: str, rows: int, columns: int, ranks: int, rank: int) -> Shard:
    share = columns // ranks
    return Shard(name, Region(0, rank * share, rows, share), Offset(name, 0, 0))


def _vocabulary_shard(arch: Architecture, name: str, ranks: int, rank: int) -> Shard:
    share = padded_vocabulary(arch) // ranks
    first = min(rank * share, arch.vocab)
    return Shard(name, Region(first, 0, min(first + share, arch.vocab) - first, arch.hidden), Offset(name, 0, 0))


def mismatch(parameters: dict[str, Tensor], arch: Architecture, ranks: int) -> str:
    """Explain why a live engine's parameters cannot be written shard by shard; "" if they can."""
    if arch.experts:
        return "it has experts, which only its own loader can place"
    expected = parameter_shapes(arch, ranks)
    if unexpected := sorted(expected.keys() ^ parameters.keys()):
        return f"its parameters differ from this layout; the first difference is {unexpected[0]}"
    for name, shape in expected.items():
        if tuple(parameters[name].shape) != shape:
            return f"{name} has shape {tuple(parameters[name].shape)} in the engine, {shape} in this layout"
    dtypes = {tensor.dtype for tensor in parameters.values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        return f"its parameters have the types {', '.join(sorted(map(str, dtypes)))}; expected one floating-point type"
    return ""
