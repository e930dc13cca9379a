"""Conversion of a Megatron distributed checkpoint, or of weights in memory, to a Hugging Face folder, streaming."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from oreal_megatron.convert import stream
from oreal_megatron.convert.hf_folder import HFFolderWriter, copy_side_files
from oreal_megatron.convert.megatron_folder import HF_SUBFOLDER, MegatronFolder, with_dtype
from oreal_megatron.models import architecture, tensors
from oreal_megatron.models.config_fields import HFConfig

TensorLayout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def convert(
    source: MegatronFolder, out: Path, cast: stream.Cast, report: stream.Report, advance: stream.Advance
) -> None:
    """Write the folder `out`, ready for transformers and vLLM."""
    layout = shapes(source, cast)
    config = with_dtype(source.config, next(iter(layout.values()))[0])
    with stream.write_atomically(out, size(layout), report) as partial:
        copy_side_files(source.path / HF_SUBFOLDER, partial, config)
        _write(partial, layout, stream.read_ahead(_tensors(source, cast)), advance)


def layout_of(config: HFConfig, dtype: torch.dtype) -> TensorLayout:
    """Return dtypes and shapes of the Hugging Face tensors of a model, in order."""
    arch, head = architecture.read(config), architecture.head(config)
    layout: TensorLayout = {}
    for entry in tensors.entries(arch, 1, 1, 0, head):
        layout |= {name: (dtype, shape) for name, shape in tensors.hf_shapes(entry, arch).items()}
    if head == "scalar":
        layout[_score_bias(arch)] = (dtype, (1,))
    return layout


def save(
    out: Path,
    side: Path,
    config: HFConfig,
    dtype: torch.dtype,
    named: Iterable[tuple[str, Tensor]],
    notes: Mapping[str, str],
) -> None:
    """Write full tensors, in the mapping's order, with the side files of the folder `side`; replace `out`.

    `notes`: text of further files, by name. Raises OSError on a full disk; `out` is then as it was.
    """
    layout, bias = layout_of(config, dtype), _score_bias(architecture.read(config))
    zeros = [(bias, torch.zeros(1, dtype=dtype))] if bias in layout else []
    on_host = ((name, tensor.cpu()) for name, tensor in itertools.chain(named, zeros))
    with stream.write_atomically(out, 0, lambda text: None, replace=True) as partial:
        copy_side_files(side, partial, with_dtype(config, dtype))
        for name, text in notes.items():
            (partial / name).write_text(text)
        _write(partial, layout, on_host, lambda count: None)


def shapes(source: MegatronFolder, cast: stream.Cast) -> TensorLayout:
    """Return dtypes and shapes of the Hugging Face tensors of a checkpoint, in order."""
    layout: TensorLayout = {}
    for entry in source.entries:
        dtype = cast.output_dtype(source.dtype(entry))
        layout |= {name: (dtype, shape) for name, shape in tensors.hf_shapes(entry, source.arch).items()}
    if source.head == "scalar":
        layout[_score_bias(source.arch)] = (dtype, (1,))
    return layout


def _score_bias(arch: architecture.Architecture) -> str:
    """Return the name of the bias of transformers' classifier, which would be random if missing; ours is zero."""
    return arch.names.score + ".bias"


def size(layout: TensorLayout) -> int:
    """Return the bytes of these tensors."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def _write(folder: Path, layout: TensorLayout, named: Iterable[tuple[str, Tensor]], advance: stream.Advance) -> None:
    writer = HFFolderWriter(folder, layout)
    for name, tensor in named:
        writer.write(name, tensor)
        advance(tensor.nbytes)
    writer.close()


def _tensors(source: MegatronFolder, cast: stream.Cast) -> Iterator[tuple[int, tuple[str, Tensor]]]:
    for entry in source.entries:
        for name, tensor in source.hf(entry).items():
            yield tensor.nbytes, (name, cast(tensor))
    if source.head == "scalar":
        yield 0, (_score_bias(source.arch), cast(torch.zeros(1, dtype=source.dtype(entry))))
