"""Qwen3, dense: normalised queries and keys, size of heads in config.json. Tensor mapping: tensors.py."""

from __future__ import annotations

from oreal_megatron.models import config_fields
from oreal_megatron.models.config_fields import ArchitectureFields, HFConfig


def read(hf: HFConfig) -> ArchitectureFields:
    """Return the fields of Architecture from a Qwen3 config.json."""
    config_fields.check(hf, read=["sliding_window"])  # has an effect only with use_sliding_window, which is rejected
    return config_fields.decoder(hf) | dict(qk_norm=True, head_dim=config_fields.require(hf, "head_dim"))
