"""Comparison of two checkpoints of either kind, tensor by tensor, bit by bit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from oreal_megatron.convert import stream, to_megatron
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.convert.megatron_folder import MegatronFolder
from oreal_megatron.models import architecture, tensors


def open_folder(path: str | Path) -> HFFolder | MegatronFolder:
    """Open a Megatron checkpoint where there is a metadata.json, else a Hugging Face folder, and check it."""
    if (Path(path) / "metadata.json").is_file():
        return MegatronFolder(path)
    folder = HFFolder(path, tokenizer=False)
    to_megatron.check_weights(folder, architecture.read(folder.config), architecture.head(folder.config))
    return folder


def first_difference(
    a: HFFolder | MegatronFolder, b: HFFolder | MegatronFolder, advance: stream.Advance = lambda count: None
) -> str | None:
    """Describe the first tensor that differs, in the order of the layers; None when all are equal."""
    arch, other_arch = architecture.read(a.config), architecture.read(b.config)
    head, other_head = architecture.head(a.config), architecture.head(b.config)
    if (arch, head) != (other_arch, other_head):
        return f"the models differ: {_describe_fields(arch, other_arch) or f'head is {head} and {other_head}'}"
    for entry in tensors.entries(arch, 1, 1, 0, head):
        tensors_a, tensors_b = a.hf(entry), b.hf(entry)
        for name, value in tensors_a.items():
            if difference := _describe_difference(value, tensors_b[name]):
                return f"{name} differs: {difference}"
            advance(value.nbytes)
    return None


def _describe_difference(a: Tensor, b: Tensor) -> str | None:
    if a.dtype != b.dtype:
        return f"it is {str(a.dtype).removeprefix('torch.')} and {str(b.dtype).removeprefix('torch.')}"
    bits = {2: torch.int16, 4: torch.int32}[a.itemsize]  # equal bits, so that NaN equals itself and -0 is not 0
    a_bits, b_bits = a.contiguous().view(bits), b.contiguous().view(bits)
    if torch.equal(a_bits, b_bits):
        return None
    unequal = a_bits != b_bits
    first = torch.unravel_index(unequal.flatten().int().argmax(), a.shape)
    position = ", ".join(str(int(index)) for index in first)
    return f"{int(unequal.sum()):,} of {a.numel():,} values, the first at [{position}]: {a[first]:g} and {b[first]:g}"


def _describe_fields(a: architecture.Architecture, b: architecture.Architecture) -> str:
    pairs = ((field, getattr(a, field), getattr(b, field)) for field in architecture.Architecture.__slots__)
    return ", ".join(f"{field} is {value_a} and {value_b}" for field, value_a, value_b in pairs if value_a != value_b)
