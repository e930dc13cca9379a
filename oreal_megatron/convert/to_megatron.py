"""A Hugging Face folder -> a Megatron distributed checkpoint, streaming."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from oreal_megatron.config import ConfigError, ParallelConfig
from oreal_megatron.convert import megatron_folder, stream, torch_dist
from oreal_megatron.convert.hf_folder import Folder
from oreal_megatron.models import architecture, tensors, torch_dist_keys
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.models.tensors import Cut, Entry


class Piece(NamedTuple):
    """A rectangle of a Megatron tensor, for the file of one rank."""

    rank: int
    entry: Entry
    start: tuple[int, ...]
    tensor: Tensor


def convert(
    source: Folder, out: Path, layout: ParallelConfig, cast: stream.Cast, say: stream.Say, advance: stream.Advance
) -> None:
    """Write `out`, cut for `layout`; it loads at any other."""
    arch, head = architecture.read(source.config), architecture.head(source.config)
    check_weights(source, arch, head)
    arch.check_layout(layout.tensor, layout.pipeline, layout.virtual)
    with stream.finished(out, size(source, cast), say) as partial:
        writer = torch_dist.Writer(partial)
        for piece in stream.ahead(_sized(_pieces(source, arch, head, layout, cast))):
            _write(writer, piece, arch)
            advance(piece.tensor.nbytes)
        for key in torch_dist_keys.extra_states(arch):
            writer.object(0, key, [None])
        writer.close()
        dtype = cast.of(source.dtype(next(tensors.entries(arch, 1, 1, 0, head)).hf[0]))
        megatron_folder.describe(source, partial, head, dtype)


def size(source: Folder, cast: stream.Cast) -> int:
    """Bytes of the weights as they will be written."""
    return sum(math.prod(source.shape(name)) * cast.of(source.dtype(name)).itemsize for name in source.files)


def check_weights(source: Folder, arch: Architecture, head: str) -> None:
    """Every tensor of the model is in the folder with its shape, and none that would be lost."""
    wanted: dict[str, tuple[int, ...]] = {}
    for entry in tensors.entries(arch, 1, 1, 0, head):
        wanted |= tensors.hf_shapes(entry, arch)
    source.require(wanted)
    for name, shape in wanted.items():
        if source.shape(name) != shape:
            raise ConfigError(f"{source.path}: {name} has shape {source.shape(name)}, config.json asks for {shape}")
    for name in source.files.keys() - wanted.keys():
        _check_surplus(source, arch, name)


def _check_surplus(source: Folder, arch: Architecture, name: str) -> None:
    """A tensor that no entry names: a buffer, a copy, or zeros. Anything else would be lost silently."""
    if name.endswith("rotary_emb.inv_freq"):  # a buffer of older transformers, which follows from config.json
        return
    if name == arch.names.output and arch.tied:
        if torch.equal(source.tensor(name), source.tensor(arch.names.embedding)):
            return
        raise ConfigError(f"{source.path}: tie_word_embeddings is true, but {name} differs from the embedding")
    if name == arch.names.score + ".bias":
        if not source.tensor(name).any():
            return
        raise ConfigError(f"{source.path}: {name} is not zero; reward models here have no such bias")
    raise ConfigError(f"{source.path} has a tensor {name}, which no {arch.family} model has; it would be lost")


def _pieces(
    source: Folder, arch: Architecture, head: str, layout: ParallelConfig, cast: stream.Cast
) -> Iterator[Piece]:
    parts = layout.pipeline * layout.virtual
    for part in range(parts):
        first = part % layout.pipeline * layout.tensor  # the stage's first rank
        for entry in tensors.entries(arch, layout.tensor, parts, part, head):
            if not entry.exported:
                continue
            if entry.cut is Cut.VOCABULARY:
                yield from _vocabulary(source, entry, layout.tensor, first, cast)
                continue
            full = cast(tensors.to_megatron(entry, arch, source.tensor))
            for rank in range(1 if entry.cut is Cut.WHOLE else layout.tensor):
                for region in entry.regions(rank, layout.tensor):
                    yield Piece(first + rank, entry, region.start, region.of(full))


def _vocabulary(source: Folder, entry: Entry, ranks: int, first: int, cast: stream.Cast) -> Iterator[Piece]:
    """Blocks of rows: embeddings are the largest tensors, and padding them whole would hold them twice."""
    (name,), columns = entry.hf, entry.shape[1]
    rows = max(stream.BLOCK_BYTES // (columns * source.dtype(name).itemsize), 1)
    for rank in range(ranks):
        (region,) = entry.regions(rank, ranks)
        for start in range(region.start[0], region.start[0] + region.size[0], rows):
            count = min(rows, region.start[0] + region.size[0] - start)
            known = min(max(source.shape(name)[0] - start, 0), count)
            block = cast(source.rows(name, start, known))
            if known < count:
                block = torch.cat([block, block.new_zeros(count - known, columns)])
            yield Piece(first + rank, entry, (start, 0), block)


def _sized(pieces: Iterator[Piece]) -> Iterator[tuple[int, Piece]]:
    for piece in pieces:
        yield piece.tensor.nbytes, piece


def _write(writer: torch_dist.Writer, piece: Piece, arch: Architecture) -> None:
    place = torch_dist_keys.place(piece.entry)
    shape, start = torch_dist_keys.stack(arch, place) + piece.entry.shape, place.index + piece.start
    writer.tensor(piece.rank, place.key, shape, start, piece.tensor[(None,) * len(place.index)])
