"""Megatron checkpoints of this project: torch_dist with a folder `hf` that describes the model.

`hf` holds config.json (its architecture tells language model from reward model), generation config and tokenizer, so
that a Hugging Face folder can be made from the checkpoint alone.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from oreal_megatron.config import ConfigError
from oreal_megatron.convert import hf_folder, torch_dist
from oreal_megatron.models import architecture, tensors, torch_dist_keys
from oreal_megatron.models.config_fields import HFConfig
from oreal_megatron.models.tensors import Entry, Sharding
from oreal_megatron.runtime import files

HF_SUBFOLDER = "hf"
# Parts of keys of other tensors in a training checkpoint.
NOT_WEIGHTS = ("optimizer.", "_extra_state", torch_dist_keys.FEATURE_PROJECTION)


def describe(source: hf_folder.HFFolder, checkpoint: Path, head: str, dtype: torch.dtype) -> None:
    """Write the description of the model into a checkpoint: `source` with this head."""
    config = with_dtype(architecture.with_head(source.config, head), dtype)
    hf_folder.copy_side_files(source.path, checkpoint / HF_SUBFOLDER, config)
    origin = {"source_fingerprint": source.fingerprint(), "head": head}
    (checkpoint / HF_SUBFOLDER / "conversion.json").write_text(json.dumps(origin, indent=2) + "\n")


def with_dtype(config: HFConfig, dtype: torch.dtype) -> HFConfig:
    """Return a config.json with this dtype, under its own key (transformers 5: dtype, before: torch_dtype)."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return config | dict.fromkeys(keys, str(dtype).removeprefix("torch."))


class MegatronFolder:
    """A Megatron checkpoint read as Hugging Face tensors."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "metadata.json").is_file() and (models := hf_folder.models_below(self.path)):
            raise ConfigError(f"{path} is not a Megatron distributed checkpoint{models}")
        self.reader = torch_dist.TorchDistReader(self.path)
        if not (self.path / HF_SUBFOLDER / "config.json").is_file():
            raise ConfigError(
                f"{path} has no {HF_SUBFOLDER}/config.json, which describes its model; copy the model's "
                "config.json and tokenizer files there"
            )
        self.arch, self.head = architecture.read(self.config), architecture.head(self.config)
        self._check()

    @cached_property
    def config(self) -> HFConfig:
        """Parsed config.json of the model."""
        return files.read_object(self.path / HF_SUBFOLDER / "config.json")

    @cached_property
    def entries(self) -> list[Entry]:
        """Mapping entries of the model."""
        return list(tensors.entries(self.arch, 1, 1, 0, self.head))

    @cached_property
    def _entry_of(self) -> dict[str, Entry]:
        return {name: entry for entry in self.entries for name in entry.hf}

    def hf(self, entry: Entry) -> dict[str, Tensor]:
        """Read the Hugging Face tensors of a mapping entry."""
        return tensors.to_hf(entry, self.arch, self.reader.tensor(*torch_dist_keys.stored_tensor(entry)))

    def tensor(self, name: str) -> Tensor:
        """Read one Hugging Face tensor, by way of the Megatron tensor that it is part of."""
        return self.hf(self._entry_of[name])[name]

    def dtype(self, entry: Entry) -> torch.dtype:
        """Return the dtype of a stored tensor."""
        return self.reader.dtype(torch_dist_keys.stored_tensor(entry).key)

    def _check(self) -> None:
        """Raise ConfigError unless the checkpoint has exactly the model's tensors, in their shapes."""
        model_keys = set()
        for entry in self.entries:
            stored = torch_dist_keys.stored_tensor(entry)
            key = stored.key
            model_keys.add(key)
            if key not in self.reader.tensors:
                raise ConfigError(f"{self.path} has no tensor {key}; does {HF_SUBFOLDER}/config.json belong to it?")
            shape = self.reader.shape(key)
            expected = torch_dist_keys.stacked_axes(self.arch, stored) + entry.shape
            if entry.sharding is Sharding.VOCABULARY:  # padded for the layout it was written at
                expected = (max((self.arch.vocab, *shape[:1])), *expected[1:])
            if shape != expected:
                raise ConfigError(
                    f"{self.path}: {key} has shape {shape}; expected {expected} from {HF_SUBFOLDER}/config.json"
                )
        for key in self.reader.tensors:
            if key not in model_keys and not any(part in key for part in NOT_WEIGHTS):
                raise ConfigError(f"{self.path} has a tensor {key}, which a {self.arch.family} model does not have")
