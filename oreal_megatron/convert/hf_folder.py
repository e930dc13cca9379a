"""Hugging Face model folders: read tensors by name, write a folder that transformers and vLLM load."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oreal_megatron.config import ConfigError
from oreal_megatron.convert.safetensors_file import SafetensorsFile, SafetensorsWriter
from oreal_megatron.models.tensors import Entry
from oreal_megatron.runtime import files

SIDE_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*",
              "vocab*", "merges.txt", "added_tokens.json", "*.py")  # fmt: skip

PROBE = 2**20  # bytes
SHARD_BYTES = 5 * 10**9  # of one safetensors file, as transformers writes them


class Folder:
    """A checkpoint folder; tensors are read lazily, one at a time. Weights alone do without a tokenizer."""

    def __init__(self, path: str | Path, tokenizer: bool = True):
        self.path = Path(path)
        for name in ("config.json", "tokenizer_config.json") if tokenizer else ("config.json",):
            if not (self.path / name).is_file():
                raise ConfigError(f"{self.path} is not a Hugging Face model folder: it has no {name}")
        if not self.files:
            raise ConfigError(f"{self.path} holds no *.safetensors file; save the model as safetensors")

    @cached_property
    def config(self) -> dict[str, Any]:
        return files.read_object(self.path / "config.json")

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files that the index names, or all *.safetensors where there is no index."""
        index = self.path / "model.safetensors.index.json"
        if not index.is_file():
            return sorted(self.path.glob("*.safetensors"))
        places = files.read_object(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ConfigError(f"{index} has no weight_map that says which file each tensor is in")
        names = sorted(set(places.values()))
        for name in names:
            if "/" in name or not (self.path / name).is_file():
                raise ConfigError(f"{self.path} lacks the shard {name}, which its {index.name} names")
        return [self.path / name for name in names]

    @cached_property
    def files(self) -> dict[str, SafetensorsFile]:
        """Open file of every tensor name."""
        found: dict[str, SafetensorsFile] = {}
        for file in map(SafetensorsFile, self.weight_files):
            for name in file.tensors:
                if name in found:
                    raise ConfigError(f"{name} is both in {found[name].path.name} and {file.path.name} of {self.path}")
                found[name] = file
        return found

    def require(self, names: Iterable[str]) -> None:
        """Refuse a folder that lacks one of these tensors."""
        for name in names:
            if name not in self.files:
                raise ConfigError(f"{self.path} has no tensor {name}; does config.json belong to these weights?")

    def tensor(self, name: str) -> Tensor:
        return self.rows(name)

    def rows(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Consecutive rows of a tensor, all by default."""
        return self.files[name].rows(name, first, count)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files[name].tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.files[name].dtype(name)

    def hf(self, entry: Entry) -> dict[str, Tensor]:
        """The Hugging Face tensors of a mapping entry."""
        return {name: self.tensor(name) for name in entry.hf}

    def fingerprint(self) -> str:
        """Digest of the weights' sizes and ends: tells other weights, at the cost of a few megabytes read."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.weight_files:
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                for start in (0, max(size - PROBE, 0)):
                    file.seek(start)
                    digest.update(f"{path.name} {size}".encode() + file.read(PROBE))
        return digest.hexdigest()


def copy_side_files(source: Path, target: Path, config: dict[str, Any]) -> None:
    """Everything of a model folder but the weights, with this config.json in place of its own."""
    target.mkdir(exist_ok=True)
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            shutil.copy(file, target)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class FolderWriter:
    """Weights of a folder, written front to back in files of at most SHARD_BYTES (or one tensor), with their index."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        self.path, self.tensors = path, tensors
        self.shards = _shards({name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()})
        self.file_of = {name: number for number, names in enumerate(self.shards) for name in names}
        self.opened, self.file = -1, None

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor."""
        if self.file_of[name] != self.opened:
            self._open(self.opened + 1)
        self.file.write(name, tensor)

    def close(self) -> None:
        self.file.close()
        if len(self.shards) > 1:
            size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors.values())
            weight_map = {name: self._name(number) for name, number in self.file_of.items()}
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (self.path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _open(self, number: int) -> None:
        if self.file:
            self.file.close()
        names = self.shards[number]
        self.file = SafetensorsWriter(self.path / self._name(number), {name: self.tensors[name] for name in names})
        self.opened = number

    def _name(self, number: int) -> str:
        count = len(self.shards)
        return f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"


def _shards(sizes: dict[str, int]) -> list[list[str]]:
    """Consecutive names whose bytes fit one file; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
