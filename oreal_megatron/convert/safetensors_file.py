"""Safetensors files, read by ranges of rows and written front to back, so that memory never holds a file.

Format: eight bytes with the length of the header (little endian), a JSON header with dtype, shape and byte range of
every tensor, then the bytes (huggingface/safetensors, README). Reading goes through pread into fresh memory and not
through a memory map, whose pages count as this process's memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oreal_megatron.config import ConfigError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100 * 2**20  # bytes


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Location of a tensor in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the file
    end: int


class SafetensorsFile:
    """Reader of one file; ConfigError where it is damaged or incomplete."""

    def __init__(self, path: Path):
        self.path, self.file = path, open(path, "rb")
        size = os.fstat(self.file.fileno()).st_size
        first = int.from_bytes(self.file.read(8), "little")
        if size < 8 or first > min(size - 8, HEADER_LIMIT):
            raise ConfigError(f"{path} is damaged or incomplete: its header does not fit into its {size} bytes")
        try:
            header = json.loads(self.file.read(first))
            header.pop("__metadata__", None)
            self.tensors = {name: _location(value, 8 + first) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged: its header is not valid safetensors ({error})") from None
        end = max((location.end for location in self.tensors.values()), default=8 + first)
        if end != size:
            raise ConfigError(f"{path} is damaged or incomplete: its header names {end} bytes, it has {size}")

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor; ConfigError where it is not supported."""
        stored = self.tensors[name].dtype
        if stored not in DTYPES:
            raise ConfigError(f"{name} in {self.path} is {stored}; supported: {', '.join(DTYPES)}")
        return DTYPES[stored]

    def rows(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Read consecutive rows of a tensor, all by default."""
        location, dtype = self.tensors[name], self.dtype(name)
        total = location.shape[0] if location.shape else 1
        row_bytes = (location.end - location.start) // max(total, 1)
        count = total - first if count is None else count
        out = torch.empty(count, *location.shape[1:], dtype=dtype)
        _read(self.file.fileno(), as_bytes(out), location.start + first * row_bytes, self.path)
        return out


def _location(value: dict[str, Any], base: int) -> TensorLocation:
    """Return the location from a header entry; ValueError where its byte range does not fit its shape."""
    start, end = value["data_offsets"]
    location = TensorLocation(value["dtype"], tuple(value["shape"]), base + start, base + end)
    if (
        location.dtype in DTYPES
        and end - start != math.prod(location.shape) * DTYPES[location.dtype].itemsize
        or start < 0
    ):
        raise ValueError(f"{location.dtype} of shape {location.shape} does not have {end - start} bytes")
    return location


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read(descriptor: int, into: memoryview, offset: int, path: Path) -> None:
    filled = 0
    while filled < len(into):
        count = os.preadv(descriptor, [into[filled : filled + 2**30]], offset + filled)
        if not count:
            raise ConfigError(f"{path} became shorter while it was read")
        filled += count


class SafetensorsWriter:
    """Writer of one file; tensors must be written in the order of `tensors`."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        self.path, self.file, start = path, open(path, "wb"), 0
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        for name, (dtype, shape) in tensors.items():
            end = start + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that data begins at a multiple of eight
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.pending = list(tensors.items())

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor; ValueError where it is not the one declared."""
        expected = self.pending.pop(0)
        if expected != (name, (tensor.dtype, tuple(tensor.shape))):
            raise ValueError(
                f"{self.path}: {name} {tensor.dtype} {tuple(tensor.shape)} was written; expected {expected}"
            )
        self.file.write(as_bytes(tensor.contiguous()))

    def close(self) -> None:
        """Sync and close the file; ValueError where a declared tensor is missing."""
        if self.pending:
            raise ValueError(f"{self.path}: {self.pending[0][0]} was declared but not written")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
