"""Check of torch_dist checkpoints for code: reading a pickle can run whatever its author put into it.

torch.distributed.checkpoint unpickles `.metadata` and every stored object without restrictions. `check` reads them
first, with an unpickler that knows the classes of a checkpoint only. Tensors are read safely by torch itself.
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
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def metadata(folder: Path) -> dcp.Metadata:
    """Return the metadata of a torch_dist checkpoint; raise ConfigError if it names files elsewhere."""
    try:
        with open(folder / ".metadata", "rb") as file:
            read = _Unpickler(file).load()
        names = [info.relative_path for info in read.storage_data.values()]
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
        raise ConfigError(f"{folder}/.metadata is missing, damaged or not part of a checkpoint: {error}") from None
    for name in names:
        if Path(name).name != name:
            raise ConfigError(f"{folder}/.metadata names the file {name}, outside the checkpoint")
    return read


def check(folder: Path) -> None:
    """Raise ConfigError if a torch_dist checkpoint holds anything but data."""
    read = metadata(folder)
    _check_archive(folder / "common.pt")
    for index, info in read.storage_data.items():
        if not isinstance(read.state_dict_metadata.get(index.fqn), dcp.TensorStorageMetadata):
            _check_archive(folder / info.relative_path, info.offset, info.length)


def _check_archive(file: Path, offset: int = 0, length: int = -1) -> None:
    """Check one torch.save archive, which may be part of a file."""
    try:
        with open(file, "rb") as stream:
            stream.seek(offset)
            torch.load(io.BytesIO(stream.read(length)), map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{file} is missing, damaged or holds something other than data (nothing was run): {reason}"
        ) from None
