"""Megatron's distributed checkpoints (torch_dist) without Megatron: read tensor by tensor, written in order.

The format is that of torch.distributed.checkpoint: a pickled `.metadata` with the location of each rectangle of each
tensor, files `__<rank>_<number>.distcp` in which each rectangle is a small torch.save archive, and beside them
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
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from oreal_megatron.config import ConfigError
from oreal_megatron.runtime import files, safe_load

ChunksByIndex = dict[tuple[int, ...], list[dcp.ChunkStorageMetadata]]
MARKER = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
          "common_backend": "torch", "common_backend_version": 1}  # fmt: skip


class _FilePart(io.RawIOBase):
    """File object over a part of a file."""

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


class TorchDistReader:
    """Reader of one checkpoint; ConfigError where it is damaged or lacks a file."""

    def __init__(self, path: Path):
        self.path = path
        self.opened: dict[str, io.FileIO] = {}
        self.chunks_at: dict[tuple[str, int], ChunksByIndex] = {}
        marker = path / "metadata.json"
        if not marker.is_file() or files.read_object(marker).get("sharded_backend") != "torch_dist":
            raise ConfigError(f"{path} is not a Megatron distributed checkpoint (torch_dist)")
        metadata = safe_load.metadata(path)
        self.tensors: dict[str, dcp.TensorStorageMetadata] = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, dcp.TensorStorageMetadata)
        }
        self.storage = metadata.storage_data
        self._check_files()

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self.storage.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else -1
            if size < end:
                state = "is missing" if size < 0 else f"has {size} bytes"
                raise ConfigError(f"{file} {state}; the checkpoint needs {end} bytes of it")
            self.opened[name] = open(file, "rb", buffering=0)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor, with the axes along which it is stacked."""
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a stored tensor."""
        return self.tensors[key].properties.dtype

    def tensor(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """Read a full stored tensor, or the one at `index` of its first axes, from its rectangles."""
        depth = len(index)
        shape, parts = self.shape(key)[depth:], self._chunks_by_index(key, depth).get(index, [])
        if sum(math.prod(chunk.sizes[depth:]) for chunk in parts) != math.prod(shape):
            raise ConfigError(f"{self.path}: the parts of {key} do not cover its shape {shape}")
        if len(parts) == 1:
            return self._chunk(key, parts[0], index)
        full = torch.empty(shape, dtype=self.dtype(key))
        for chunk in parts:
            rectangle = zip(chunk.offsets[depth:], chunk.sizes[depth:], strict=True)
            region = tuple(slice(first, first + count) for first, count in rectangle)
            full[region] = self._chunk(key, chunk, index)
        return full

    def _chunks_by_index(self, key: str, depth: int) -> ChunksByIndex:
        """Return the rectangles of a stored tensor by their indices along its first `depth` axes."""
        if (key, depth) not in self.chunks_at:
            by_index = self.chunks_at[key, depth] = defaultdict(list)
            for chunk in self.tensors[key].chunks:
                axes = list(zip(chunk.offsets, chunk.sizes, self.shape(key), strict=True))[:depth]
                for index in itertools.product(*(range(first, min(first + n, end)) for first, n, end in axes)):
                    by_index[index].append(chunk)
        return self.chunks_at[key, depth]

    def _chunk(self, key: str, chunk: dcp.ChunkStorageMetadata, index: tuple[int, ...]) -> Tensor:
        """Read one rectangle at an index of the first axes."""
        info = self.storage[dcp.MetadataIndex(key, chunk.offsets)]
        part = _FilePart(self.opened[info.relative_path], info.offset, info.length)
        try:
            tensor = torch.load(cast(IO[bytes], part), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ConfigError(f"{self.path}/{info.relative_path} is damaged in the bytes of {key}: {error}") from None
        if tensor.shape != chunk.sizes or tensor.dtype != self.dtype(key):
            raise ConfigError(
                f"{self.path}: a part of {key} is {tensor.dtype} {tuple(tensor.shape)}; expected "
                f"{self.dtype(key)} {tuple(chunk.sizes)} from .metadata"
            )
        return tensor[tuple(position - first for position, first in zip(index, chunk.offsets, strict=False))]


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """Switch off torch's checksum, which is four times slower than the disk and not read by torch.load."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class TorchDistWriter:
    """Writer of one checkpoint into an empty folder. `rank` selects the file, as if that rank of a layout wrote it."""

    def __init__(self, path: Path):
        self.path = path
        self.files: dict[int, BinaryIO] = {}
        self.metadata: dict[str, dcp.TensorStorageMetadata | dcp.BytesStorageMetadata] = {}
        self.storage: dict[dcp.MetadataIndex, filesystem._StorageInfo] = {}

    def tensor(self, rank: int, key: str, shape: tuple[int, ...], offsets: tuple[int, ...], block: Tensor) -> None:
        """Write the rectangle of a tensor of `shape` that begins at `offsets`."""
        stored = self.metadata.get(key)
        if not isinstance(stored, dcp.TensorStorageMetadata):
            properties = dcp.TensorProperties(dtype=block.dtype)
            stored = self.metadata[key] = dcp.TensorStorageMetadata(properties, torch.Size(shape), [])
        chunk = dcp.ChunkStorageMetadata(torch.Size(offsets), block.shape)
        stored.chunks.append(chunk)
        # torch.save writes the full storage, which must not hold more than the block.
        is_alone = block.is_contiguous() and block.untyped_storage().nbytes() == block.nbytes
        self._save(rank, dcp.MetadataIndex(key, chunk.offsets), block if is_alone else block.clone())

    def object(self, rank: int, key: str, value: Any) -> None:
        """Write an object that is not a tensor."""
        self.metadata[key] = dcp.BytesStorageMetadata()
        self._save(rank, dcp.MetadataIndex(key), value)

    def close(self) -> None:
        """Sync the files and write the metadata."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        with open(self.path / ".metadata", "wb") as metadata_file:
            pickle.dump(dcp.Metadata(self.metadata, storage_data=self.storage, version="1.0.0"), metadata_file)
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
