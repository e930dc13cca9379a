"""A Megatron distributed checkpoint -> a Hugging Face folder, streaming; and weights that are already in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oreal_megatron.convert import stream
from oreal_megatron.convert.hf_folder import FolderWriter, copy_side_files
from oreal_megatron.convert.megatron_folder import DESCRIPTION, MegatronFolder, with_dtype
from oreal_megatron.models import architecture, tensors

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def convert(source: MegatronFolder, out: Path, cast: stream.Cast, say: stream.Say, advance: stream.Advance) -> None:
    """Write `out`, ready for transformers and vLLM."""
    written = shapes(source, cast)
    config = with_dtype(source.config, next(iter(written.values()))[0])
    with stream.finished(out, size(written), say) as partial:
        copy_side_files(source.path / DESCRIPTION, partial, config)
        _write(partial, written, stream.ahead(_tensors(source, cast)), advance)


def save(
    out: Path, side: Path, config: dict[str, Any], dtype: torch.dtype, named: Iterable[tuple[str, Tensor]]
) -> None:
    """Write full tensors, in the mapping's order, with the side files of the folder `side`; replaces `out`."""
    arch, written = architecture.read(config), {}
    for entry in tensors.entries(arch, 1, 1, 0, architecture.head(config)):
        written |= {name: (dtype, shape) for name, shape in tensors.hf_shapes(entry, arch).items()}
    with stream.finished(out, size(written), lambda text: None, replace=True) as partial:
        copy_side_files(side, partial, with_dtype(config, dtype))
        _write(partial, written, ((name, tensor.cpu()) for name, tensor in named), lambda count: None)


def shapes(source: MegatronFolder, cast: stream.Cast) -> Shapes:
    """What the Hugging Face folder of a checkpoint will hold, in order."""
    found: Shapes = {}
    for entry in source.entries:
        dtype = cast.of(source.dtype(entry))
        found |= {name: (dtype, shape) for name, shape in tensors.hf_shapes(entry, source.arch).items()}
    if source.head == "scalar":  # transformers' classifier has a bias, which it would otherwise draw at random
        found[source.arch.names.score + ".bias"] = (dtype, (1,))
    return found


def size(written: Shapes) -> int:
    """Bytes of tensors of these dtypes and shapes."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in written.values())


def _write(folder: Path, written: Shapes, named: Iterable[tuple[str, Tensor]], advance: stream.Advance) -> None:
    writer = FolderWriter(folder, written)
    for name, tensor in named:
        writer.write(name, tensor)
        advance(tensor.nbytes)
    writer.close()


def _tensors(source: MegatronFolder, cast: stream.Cast) -> Iterator[tuple[int, tuple[str, Tensor]]]:
    for entry in source.entries:
        for name, tensor in source.hf(entry).items():
            yield tensor.nbytes, (name, cast(tensor))
    if source.head == "scalar":
        yield 0, (source.arch.names.score + ".bias", cast(torch.zeros(1, dtype=source.dtype(entry))))
