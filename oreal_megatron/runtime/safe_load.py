"""Checkpoints may come from anywhere, and reading a pickle can run whatever its writer liked. Here it cannot.

torch.distributed.checkpoint reads `.metadata` and every stored object with the whole power of pickle. `check` reads
them before it does, with unpicklers that know a checkpoint's classes only; tensors it reads safely by itself.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

from oreal_megatron.config import ConfigError

ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8",
              "uint8", "bool", "float8_e4m3fn", "float8_e5m2", "strided", "contiguous_format", "preserve_format"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a checkpoint's metadata does not need")
        return super().find_class(module, name)


def metadata(folder: Path) -> dcp.Metadata:
    """What a torch_dist checkpoint says of its tensors and files; refuses one whose files lie elsewhere."""
    try:
        with open(folder / ".metadata", "rb") as file:
            read = _Unpickler(file).load()
        places = [info.relative_path for info in read.storage_data.values()]
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
        raise ConfigError(f"{folder}/.metadata is missing, damaged or not a checkpoint's: {error}") from None
    for place in places:
        if Path(place).name != place:
            raise ConfigError(f"{folder}/.metadata names the file {place}, outside the checkpoint")
    return read


def check(folder: Path) -> None:
    """Refuse a torch_dist checkpoint in which anything but data is stored."""
    read = metadata(folder)
    _only_data(folder / "common.pt")
    for index, info in read.storage_data.items():
        if not isinstance(read.state_dict_metadata.get(index.fqn), dcp.TensorStorageMetadata):
            _only_data(folder / info.relative_path, info.offset, info.length)


def _only_data(file: Path, offset: int = 0, length: int = -1) -> None:
    """Of a torch.save archive, which may be part of a file."""
    try:
        with open(file, "rb") as stream:
            stream.seek(offset)
            torch.load(io.BytesIO(stream.read(length)), map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{file} is missing, damaged or holds something else than data, of which nothing was run: {why}"
        ) from None
