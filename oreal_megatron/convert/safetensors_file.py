"""The safetensors format, read by ranges of rows and written front to back, so that no file is ever held in memory.

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

import torch
from torch import Tensor

from oreal_megatron.config import ConfigError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100 * 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor is in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the file
    end: int


class SafetensorsFile:
    """One file; refuses one that is damaged or incomplete."""

    def __init__(self, path: Path):
        self.path, self.file = path, open(path, "rb")
        size = os.fstat(self.file.fileno()).st_size
        first = int.from_bytes(self.file.read(8), "little")
        if size < 8 or first > min(size - 8, HEADER_LIMIT):
            raise ConfigError(f"{path} is damaged or incomplete: its header does not fit into its {size} bytes")
        try:
            header = json.loads(self.file.read(first))
            header.pop("__metadata__", None)
            self.tensors = {name: _stored(value, 8 + first) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged: its header is not that of a safetensors file ({error})") from None
        end = max((stored.end for stored in self.tensors.values()), default=8 + first)
        if end != size:
            raise ConfigError(f"{path} is damaged or incomplete: its header speaks of {end} bytes, it has {size}")

    def dtype(self, name: str) -> torch.dtype:
        stored = self.tensors[name].dtype
        if stored not in DTYPES:
            raise ConfigError(f"{name} in {self.path} is {stored}; supported are {', '.join(DTYPES)}")
        return DTYPES[stored]

    def rows(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Consecutive rows of a tensor, all by default."""
        stored, dtype = self.tensors[name], self.dtype(name)
        whole = stored.shape[0] if stored.shape else 1
        row = (stored.end - stored.start) // max(whole, 1)
        count = whole - first if count is None else count
        out = torch.empty(count, *stored.shape[1:], dtype=dtype)
        _read(self.file.fileno(), as_bytes(out), stored.start + first * row, self.path)
        return out


def _stored(value: dict, base: int) -> Stored:
    start, end = value["data_offsets"]
    stored = Stored(value["dtype"], tuple(value["shape"]), base + start, base + end)
    if stored.dtype in DTYPES and end - start != math.prod(stored.shape) * DTYPES[stored.dtype].itemsize or start < 0:
        raise ValueError(f"{stored.dtype} of shape {stored.shape} does not have {end - start} bytes")
    return stored


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _read(descriptor: int, into: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done : done + 2**30]], offset + done)
        if not count:
            raise ConfigError(f"{path} became shorter while it was read")
        done += count


class SafetensorsWriter:
    """One file, whose tensors must come in the order of `tensors`."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        self.path, self.file, start, header = path, open(path, "wb"), 0, {"__metadata__": {"format": "pt"}}
        for name, (dtype, shape) in tensors.items():
            end = start + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of eight
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.announced = list(tensors.items())

    def write(self, name: str, tensor: Tensor) -> None:
        wanted = self.announced.pop(0)
        if wanted != (name, (tensor.dtype, tuple(tensor.shape))):
            raise ValueError(f"{self.path}: {name} {tensor.dtype} {tuple(tensor.shape)} came, announced was {wanted}")
        self.file.write(as_bytes(tensor.contiguous()))

    def close(self) -> None:
        if self.announced:
            raise ValueError(f"{self.path}: {self.announced[0][0]} was announced and did not come")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
