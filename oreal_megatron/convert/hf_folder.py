"""Hugging Face model folders: read tensors by name, write a folder that transformers and vLLM load."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from oreal_megatron.config import ConfigError
from oreal_megatron.convert.safetensors_file import SafetensorsFile, SafetensorsWriter
from oreal_megatron.models.config_fields import HFConfig
from oreal_megatron.models.tensors import Entry
from oreal_megatron.runtime import files

SIDE_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*",
              "vocab*", "merges.txt", "added_tokens.json", "*.py")  # fmt: skip

SHARD_BYTES = 5 * 10**9  # size of one safetensors file, as in transformers


class HFFolder:
    """Hugging Face checkpoint folder; tensors are read lazily, one at a time.

    `tokenizer=False` accepts a folder without tokenizer files.
    """

    def __init__(self, path: str | Path, tokenizer: bool = True):
        self.path = Path(path)
        if not self.path.exists():
            raise ConfigError(
                f"{path} does not exist; expected a folder with a Hugging Face model. A model of the hub is downloaded "
                f"first: hf download NAME --local-dir {path}"
            )
        for name in ("config.json", "tokenizer_config.json") if tokenizer else ("config.json",):
            if not (self.path / name).is_file():
                hint = models_below(self.path)
                raise ConfigError(f"{self.path} is not a Hugging Face model folder: {name} is missing{hint}")
        if not self.files:
            hint = models_below(self.path) or "; save the model as safetensors"
            raise ConfigError(f"{self.path} has no *.safetensors file{hint}")

    @cached_property
    def config(self) -> HFConfig:
        """Parsed config.json."""
        return files.read_object(self.path / "config.json")

    @cached_property
    def weight_files(self) -> list[Path]:
        """Files that the index names, or all *.safetensors where there is no index."""
        index = self.path / "model.safetensors.index.json"
        if not index.is_file():
            return sorted(self.path.glob("*.safetensors"))
        weight_map = files.read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ConfigError(f"{index} has no weight_map from tensor names to files")
        names = sorted(set(weight_map.values()))
        for name in names:
            if "/" in name or not (self.path / name).is_file():
                raise ConfigError(f"{self.path} lacks the shard {name}, which its {index.name} names")
        self._refuse_unnamed(index, names)
        return [self.path / name for name in names]

    def _refuse_unnamed(self, index: Path, names: Iterable[str]) -> None:
        """Raise ConfigError for weights that the index does not name: readers differ in whether they load them.

        transformers prefers model.safetensors to an index, and merges adapters. Mistral's consolidated.safetensors, a
        copy in another form, is read by neither transformers nor vLLM.
        """
        others = {path.name for path in self.path.glob("*.safetensors")} - set(names)
        if unnamed := sorted(name for name in others if not name.startswith("consolidated")):
            raise ConfigError(
                f"{self.path} holds {', '.join(unnamed)}, which {index.name} does not name; remove what does not "
                "belong to the model, or the index if it is of another save"
            )

    @cached_property
    def files(self) -> dict[str, SafetensorsFile]:
        """Open file of each tensor."""
        file_of: dict[str, SafetensorsFile] = {}
        for file in map(SafetensorsFile, self.weight_files):
            for name in file.tensors:
                if name in file_of:
                    raise ConfigError(
                        f"{name} is in both {file_of[name].path.name} and {file.path.name} of {self.path}"
                    )
                file_of[name] = file
        return file_of

    def require(self, names: Iterable[str]) -> None:
        """Raise ConfigError where one of these tensors is missing."""
        for name in names:
            if name not in self.files:
                raise ConfigError(f"{self.path} has no tensor {name}; does config.json belong to these weights?")

    def tensor(self, name: str) -> Tensor:
        """Read a tensor."""
        return self.rows(name)

    def rows(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Read consecutive rows of a tensor, all by default."""
        return self.files[name].rows(name, first, count)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.files[name].tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self.files[name].dtype(name)

    def hf(self, entry: Entry) -> dict[str, Tensor]:
        """Read the Hugging Face tensors of a mapping entry."""
        return {name: self.tensor(name) for name in entry.hf}

    def fingerprint(self) -> str:
        """Return a digest of the weight files' sizes and ends."""
        return files.fingerprint(self.weight_files)


def models_below(path: Path) -> str:
    """Return the end of a message that names the models in a run folder or a checkpoint of a run, "" without any."""
    newest = sorted(path.glob("checkpoints/step_*[0-9]"))[-1:]
    folders = (folder / name for folder in (path, *newest) for name in ("policy", "reward_model", "best"))
    models = [str(folder) for folder in folders if any(folder.glob("*.json"))]
    return f"; a model in it is {' or '.join(models)}" if models else ""


def copy_side_files(source: Path, target: Path, config: HFConfig) -> None:
    """Copy everything of a model folder but the weights, and write this config.json."""
    target.mkdir(exist_ok=True)
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            shutil.copy(file, target)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class HFFolderWriter:
    """Writer of a folder's weights, in order, in files of at most SHARD_BYTES (or one tensor), with their index."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        self.path, self.tensors = path, tensors
        self.shards = _shards({name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()})
        self.file_of = {name: number for number, names in enumerate(self.shards) for name in names}
        self.opened = -1  # number of the open file
        self.file: SafetensorsWriter | None = None

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        if self.file is None or self.file_of[name] != self.opened:
            self.file = self._open(self.opened + 1)
        self.file.write(name, tensor)

    def close(self) -> None:
        """Close the last file and write the index."""
        if self.file is not None:
            self.file.close()
        if len(self.shards) > 1:
            size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors.values())
            weight_map = {name: self._name(number) for name, number in self.file_of.items()}
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (self.path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _open(self, number: int) -> SafetensorsWriter:
        if self.file:
            self.file.close()
        names = self.shards[number]
        self.opened = number
        return SafetensorsWriter(self.path / self._name(number), {name: self.tensors[name] for name in names})

    def _name(self, number: int) -> str:
        count = len(self.shards)
        return f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"


def _shards(sizes: dict[str, int]) -> list[list[str]]:
    """Group consecutive names whose bytes fit one file; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
