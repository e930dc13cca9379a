"""Megatron's distributed checkpoints (torch_dist) without Megatron: read tensor by tensor, written front to back.

The format is that of torch.distributed.checkpoint: a pickled `.metadata` that says which rectangle of which tensor
lies where, files `__<rank>_<number>.distcp` in which each rectangle is a small torch.save archive, and beside them
Megatron's `metadata.json` and `common.pt`. safe_load.py reads `.metadata`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import pickle
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from oreal_megatron.config import ConfigError
from oreal_megatron.runtime import files, safe_load

MARKER = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
          "common_backend": "torch", "common_backend_version": 1}  # fmt: skip


class _Slice(io.RawIOBase):
    """Part of a file as a file of its own."""

    def __init__(self, file: io.FileIO, start: int, length: int):
        self.file, self.start, self.length, self.at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(self.length - self.at, 0)]
        count = os.preadv(self.file.fileno(), [view], self.start + self.at)
        self.at += count
        return count


class Reader:
    """One checkpoint; refuses one that is damaged or lacks a file."""

    def __init__(self, path: Path):
        self.path, self.opened, self.pieces = path, {}, {}
        marker = path / "metadata.json"
        if not marker.is_file() or files.read_object(marker).get("sharded_backend") != "torch_dist":
            raise ConfigError(f"{path} is not a Megatron distributed checkpoint (torch_dist)")
        read = safe_load.metadata(path)
        self.tensors = {key: value for key, value in read.state_dict_metadata.items() if hasattr(value, "chunks")}
        self.storage = read.storage_data
        self._check_files()

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self.storage.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else -1
            if size < end:
                found = "is missing" if size < 0 else f"has {size} bytes"
                raise ConfigError(f"{file} {found}, the checkpoint needs {end} bytes of it")
            self.opened[name] = open(file, "rb", buffering=0)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a stored tensor, with the axes along which it is stacked."""
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].properties.dtype

    def tensor(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """A whole stored tensor, or the one at `index` of its first axes; its rectangles are put together."""
        depth = len(index)
        shape, parts = self.shape(key)[depth:], self._pieces(key, depth).get(index, [])
        if sum(math.prod(chunk.sizes[depth:]) for chunk in parts) != math.prod(shape):
            raise ConfigError(f"{self.path}: the pieces of {key} do not add up to its shape {shape}")
        if len(parts) == 1:
            return self._chunk(key, parts[0], index)
        full = torch.empty(shape, dtype=self.dtype(key))
        for chunk in parts:
            rectangle = zip(chunk.offsets[depth:], chunk.sizes[depth:], strict=True)
            where = tuple(slice(first, first + count) for first, count in rectangle)
            full[where] = self._chunk(key, chunk, index)
        return full

    def _pieces(self, key: str, depth: int) -> dict[tuple[int, ...], list[dcp.ChunkStorageMetadata]]:
        """Rectangles of a stored tensor by their places along its first `depth` axes."""
        if (key, depth) not in self.pieces:
            found = self.pieces[key, depth] = defaultdict(list)
            for chunk in self.tensors[key].chunks:
                axes = list(zip(chunk.offsets, chunk.sizes, self.shape(key), strict=True))[:depth]
                for index in itertools.product(*(range(first, min(first + n, end)) for first, n, end in axes)):
                    found[index].append(chunk)
        return self.pieces[key, depth]

    def _chunk(self, key: str, chunk: dcp.ChunkStorageMetadata, index: tuple[int, ...]) -> Tensor:
        info = self.storage[dcp.MetadataIndex(key, chunk.offsets)]
        part = _Slice(self.opened[info.relative_path], info.offset, info.length)
        try:
            tensor = torch.load(part, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ConfigError(f"{self.path}/{info.relative_path} is damaged where {key} lies: {error}") from None
        if tensor.shape != chunk.sizes or tensor.dtype != self.dtype(key):
            raise ConfigError(
                f"{self.path}: a piece of {key} is {tensor.dtype} {tuple(tensor.shape)}, .metadata says "
                f"{self.dtype(key)} {tuple(chunk.sizes)}"
            )
        return tensor[tuple(place - first for place, first in zip(index, chunk.offsets, strict=False))]


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """torch's checksum is four times slower than the disk, and torch.load does not look at it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class Writer:
    """One checkpoint into an empty folder. `rank` names the file that the rank of a layout would write."""

    def __init__(self, path: Path):
        self.path, self.files = path, {}
        self.metadata, self.storage = {}, {}

    def tensor(self, rank: int, key: str, shape: tuple[int, ...], offsets: tuple[int, ...], piece: Tensor) -> None:
        """The rectangle of a tensor of `shape` that begins at `offsets`."""
        if key not in self.metadata:
            properties = dcp.TensorProperties(dtype=piece.dtype)
            self.metadata[key] = dcp.TensorStorageMetadata(properties, torch.Size(shape), [])
        chunk = dcp.ChunkStorageMetadata(torch.Size(offsets), piece.shape)
        self.metadata[key].chunks.append(chunk)
        own = piece.is_contiguous() and piece.untyped_storage().nbytes() == piece.nbytes
        self._save(rank, dcp.MetadataIndex(key, chunk.offsets), piece if own else piece.clone())  # saves the storage

    def object(self, rank: int, key: str, value: Any) -> None:
        """Something that is not a tensor."""
        self.metadata[key] = dcp.BytesStorageMetadata()
        self._save(rank, dcp.MetadataIndex(key), value)

    def close(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        with open(self.path / ".metadata", "wb") as file:
            pickle.dump(dcp.Metadata(self.metadata, storage_data=self.storage, version="1.0.0"), file)
        torch.save({}, self.path / "common.pt")
        (self.path / "metadata.json").write_text(json.dumps(MARKER))

    def _save(self, rank: int, index: dcp.MetadataIndex, value: Any) -> None:
        if rank not in self.files:
            self.files[rank] = open(self.path / f"__{rank}_0.distcp", "wb")
        file = self.files[rank]
        start = file.tell()
        with _without_checksums():
            torch.save(value, file)
        self.storage[index] = filesystem._StorageInfo(f"__{rank}_0.distcp", start, file.tell() - start)
