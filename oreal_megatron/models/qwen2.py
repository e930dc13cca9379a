"""Qwen2 and Qwen2.5: biases on query, key and value."""

from __future__ import annotations

from oreal_megatron.models import config_fields
from oreal_megatron.models.config_fields import ArchitectureFields, HFConfig


def read(hf: HFConfig) -> ArchitectureFields:
    """Return the fields of Architecture from a Qwen2 config.json."""
    config_fields.check(hf, read=["sliding_window"])  # has an effect only with use_sliding_window, which is rejected
    return config_fields.decoder(hf) | dict(qkv_bias=True)
