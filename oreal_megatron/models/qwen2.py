"""Qwen2 and Qwen2.5: biases on query, key and value."""

from __future__ import annotations

from typing import Any

from oreal_megatron.models import config_fields


def read(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of Architecture from a Qwen2 config.json."""
    config_fields.check(hf, read=["sliding_window"])  # of effect only with use_sliding_window, which is refused
    return config_fields.decoder(hf) | dict(qkv_bias=True)
