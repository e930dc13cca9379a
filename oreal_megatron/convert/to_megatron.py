"""Conversion of a Hugging Face folder to a Megatron distributed checkpoint, streaming."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from oreal_megatron.config import ConfigError, ParallelConfig
from oreal_megatron.convert import megatron_folder, stream, torch_dist
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.models import architecture, tensors, torch_dist_keys
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.models.tensors import Entry, Sharding


class RankBlock(NamedTuple):
    """Rectangle of a Megatron tensor, for the file of one rank."""

    rank: int
    entry: Entry
    start: tuple[int, ...]
    tensor: Tensor


def convert(
    source: HFFolder,
    out: Path,
    layout: ParallelConfig,
    cast: stream.Cast,
    report: stream.Report,
    advance: stream.Advance,
) -> None:
    """Write the checkpoint `out`, sharded for `layout`; it can be loaded at any other layout."""
    arch, head = architecture.read(source.config), architecture.head(source.config)
    check_weights(source, arch, head)
    arch.check_layout(layout.tensor, layout.pipeline, layout.virtual)
    with stream.write_atomically(out, size(source, cast), report) as partial:
        writer = torch_dist.TorchDistWriter(partial)
        for block in stream.read_ahead(_with_bytes(_blocks(source, arch, head, layout, cast))):
            _write_block(writer, block, arch)
            advance(block.tensor.nbytes)
        for key in torch_dist_keys.extra_states(arch):
            writer.object(0, key, [None])
        writer.close()
        dtype = cast.output_dtype(source.dtype(next(tensors.entries(arch, 1, 1, 0, head)).hf[0]))
        megatron_folder.describe(source, partial, head, dtype)


def size(source: HFFolder, cast: stream.Cast) -> int:
    """Return the bytes of the weights as written."""
    return sum(math.prod(source.shape(name)) * cast.output_dtype(source.dtype(name)).itemsize for name in source.files)


def check_weights(source: HFFolder, arch: Architecture, head: str) -> None:
    """Raise ConfigError unless the folder has every tensor of the model, in its shape, and none that would be lost."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in tensors.entries(arch, 1, 1, 0, head):
        shapes |= tensors.hf_shapes(entry, arch)
    source.require(shapes)
    for name, shape in shapes.items():
        if source.shape(name) != shape:
            raise ConfigError(
                f"{source.path}: {name} has shape {source.shape(name)}, expected {shape} from config.json"
            )
    for name in source.files.keys() - shapes.keys():
        _check_surplus(source, arch, name)


def _check_surplus(source: HFFolder, arch: Architecture, name: str) -> None:
    """Accept a tensor that no entry names if it is a buffer, a copy or zero; any other would be lost silently."""
    if name.endswith("rotary_emb.inv_freq"):  # a buffer of older transformers, which follows from config.json
        return
    if name == arch.names.output and arch.tied:
        if torch.equal(source.tensor(name), source.tensor(arch.names.embedding)):
            return
        raise ConfigError(f"{source.path}: tie_word_embeddings is true, but {name} differs from the embedding")
    if name == arch.names.score + ".bias":
        if not source.tensor(name).any():
            return
        raise ConfigError(f"{source.path}: {name} is not zero; reward models without a bias only are supported")
    raise ConfigError(f"{source.path} has a tensor {name}, which a {arch.family} model does not have; it would be lost")


def _blocks(
    source: HFFolder, arch: Architecture, head: str, layout: ParallelConfig, cast: stream.Cast
) -> Iterator[RankBlock]:
    """Yield the checkpoint's content in the order of stages and layers."""
    parts = layout.pipeline * layout.virtual
    for part in range(parts):
        first = part % layout.pipeline * layout.tensor  # the stage's first rank
        for entry in tensors.entries(arch, layout.tensor, parts, part, head):
            if not entry.exported:
                continue
            if entry.sharding is Sharding.VOCABULARY:
                yield from _vocabulary_blocks(source, entry, layout.tensor, first, cast)
                continue
            full = cast(tensors.to_megatron(entry, arch, source.tensor))
            for rank in range(1 if entry.sharding is Sharding.REPLICATED else layout.tensor):
                for region in entry.regions(rank, layout.tensor):
                    yield RankBlock(first + rank, entry, region.start, region.select(full))


def _vocabulary_blocks(
    source: HFFolder, entry: Entry, ranks: int, first: int, cast: stream.Cast
) -> Iterator[RankBlock]:
    """Yield blocks of rows: embeddings are the largest tensors, and padding one at once would need its memory twice."""
    (name,), columns = entry.hf, entry.shape[1]
    rows = max(stream.BLOCK_BYTES // (columns * source.dtype(name).itemsize), 1)
    for rank in range(ranks):
        (region,) = entry.regions(rank, ranks)
        for start in range(region.start[0], region.start[0] + region.size[0], rows):
            count = min(rows, region.start[0] + region.size[0] - start)
            real = min(max(source.shape(name)[0] - start, 0), count)
            block = cast(source.rows(name, start, real))
            if real < count:
                block = torch.cat([block, block.new_zeros(count - real, columns)])
            yield RankBlock(first + rank, entry, (start, 0), block)


def _with_bytes(blocks: Iterator[RankBlock]) -> Iterator[tuple[int, RankBlock]]:
    for block in blocks:
        yield block.tensor.nbytes, block


def _write_block(writer: torch_dist.TorchDistWriter, block: RankBlock, arch: Architecture) -> None:
    stored = torch_dist_keys.stored_tensor(block.entry)
    shape, start = torch_dist_keys.stacked_axes(arch, stored) + block.entry.shape, stored.indices + block.start
    writer.tensor(block.rank, stored.key, shape, start, block.tensor[(None,) * len(stored.indices)])
