"""Hugging Face model folders: read tensors by name, write a folder that transformers and vLLM load."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from oreal_megatron.config import ConfigError

SIDE_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*",
              "vocab*", "merges.txt", "added_tokens.json")  # fmt: skip

PROBE = 2**20  # bytes


class Folder:
    """A checkpoint folder; tensors are read lazily, one at a time."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        for name in ("config.json", "tokenizer_config.json"):
            if not (self.path / name).is_file():
                raise ConfigError(f"{self.path} is not a Hugging Face model folder: it has no {name}")
        if not self.files:
            raise ConfigError(f"{self.path} holds no *.safetensors file; save the model as safetensors")

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.path / "config.json").read_text())

    @cached_property
    def files(self) -> dict[str, Any]:
        """Open file of every tensor name."""
        try:
            opened = [safe_open(file, framework="pt") for file in sorted(self.path.glob("*.safetensors"))]
        except SafetensorError as error:
            raise ConfigError(f"{self.path} holds a damaged or incomplete *.safetensors file: {error}") from None
        return {name: file for file in opened for name in file.keys()}

    def require(self, names: Iterable[str]) -> None:
        """Refuse a folder that lacks one of these tensors."""
        for name in names:
            if name not in self.files:
                raise ConfigError(f"{self.path} has no tensor {name}; does config.json belong to these weights?")

    def tensor(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)

    def fingerprint(self) -> str:
        """Digest of the weights' sizes and ends: tells other weights, at the cost of a few megabytes read."""
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(self.path.glob("*.safetensors")):
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                for start in (0, max(size - PROBE, 0)):
                    file.seek(start)
                    digest.update(f"{path.name} {size}".encode() + file.read(PROBE))
        return digest.hexdigest()

    def save_as(self, path: str | Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """A folder with these tensors and this folder's config and tokenizer, complete before it has its name."""
        path, partial = Path(path), Path(f"{path}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for pattern in SIDE_FILES:
            for file in self.path.glob(pattern):
                shutil.copy(file, partial)
        weights = {name: tensor.cpu().contiguous() for name, tensor in tensors}
        save_file(weights, partial / "model.safetensors", {"format": "pt"})
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
