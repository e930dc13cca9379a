"""Our Megatron checkpoints: torch_dist, and beside it the folder `hf` that says which model the tensors are.

`hf` holds config.json (its architecture tells language model from reward model), generation config and tokenizer, so
that nothing else is needed to make a Hugging Face folder of the checkpoint.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oreal_megatron.config import ConfigError
from oreal_megatron.convert import hf_folder, torch_dist
from oreal_megatron.models import architecture, tensors, torch_dist_keys
from oreal_megatron.models.tensors import Cut, Entry
from oreal_megatron.runtime import files

DESCRIPTION = "hf"
NOT_WEIGHTS = ("optimizer.", "_extra_state")  # what a training checkpoint holds besides


def describe(source: hf_folder.Folder, checkpoint: Path, head: str, dtype: torch.dtype) -> None:
    """Write into a checkpoint which model it holds: `source` with this head."""
    config = with_dtype(architecture.with_head(source.config, head), dtype)
    hf_folder.copy_side_files(source.path, checkpoint / DESCRIPTION, config)
    facts = {"source_fingerprint": source.fingerprint(), "head": head}
    (checkpoint / DESCRIPTION / "conversion.json").write_text(json.dumps(facts, indent=2) + "\n")


def with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json that names this dtype, under the key it has (transformers 5: dtype, before: torch_dtype)."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return config | dict.fromkeys(keys, str(dtype).removeprefix("torch."))


class MegatronFolder:
    """A Megatron checkpoint read as Hugging Face tensors."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.reader = torch_dist.Reader(self.path)
        if not (self.path / DESCRIPTION / "config.json").is_file():
            raise ConfigError(
                f"{path} does not say which model it holds: it has no {DESCRIPTION}/config.json; put the model's "
                "config.json and tokenizer files there"
            )
        self.arch, self.head = architecture.read(self.config), architecture.head(self.config)
        self._check()

    @cached_property
    def config(self) -> dict[str, Any]:
        return files.read_object(self.path / DESCRIPTION / "config.json")

    @cached_property
    def entries(self) -> list[Entry]:
        return list(tensors.entries(self.arch, 1, 1, 0, self.head))

    @cached_property
    def _entry_of(self) -> dict[str, Entry]:
        return {name: entry for entry in self.entries for name in entry.hf}

    def hf(self, entry: Entry) -> dict[str, Tensor]:
        """The Hugging Face tensors of a mapping entry."""
        return tensors.to_hf(entry, self.arch, self.reader.tensor(*torch_dist_keys.place(entry)))

    def tensor(self, name: str) -> Tensor:
        """One Hugging Face tensor; reads the whole Megatron tensor that it is part of."""
        return self.hf(self._entry_of[name])[name]

    def dtype(self, entry: Entry) -> torch.dtype:
        return self.reader.dtype(torch_dist_keys.place(entry).key)

    def _check(self) -> None:
        """Every tensor of the model is there with its shape, and no other."""
        wanted = set()
        for entry in self.entries:
            place = torch_dist_keys.place(entry)
            key = place.key
            wanted.add(key)
            if key not in self.reader.tensors:
                raise ConfigError(f"{self.path} has no tensor {key}; does {DESCRIPTION}/config.json belong to it?")
            found, asked = self.reader.shape(key), torch_dist_keys.stack(self.arch, place) + entry.shape
            if entry.cut is Cut.VOCABULARY:  # padded for whatever layout it was written at
                asked = (max((self.arch.vocab, *found[:1])), *asked[1:])
            if found != asked:
                raise ConfigError(f"{self.path}: {key} has shape {found}, {DESCRIPTION}/config.json asks {asked}")
        for key in self.reader.tensors:
            if key not in wanted and not any(part in key for part in NOT_WEIGHTS):
                raise ConfigError(f"{self.path} has a tensor {key}, which no {self.arch.family} model has")
