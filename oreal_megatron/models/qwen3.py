"""Qwen3, dense: queries and keys are normalised, and heads have a size of their own."""

from __future__ import annotations

from typing import Any

from oreal_megatron.models import config_fields


def read(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of Architecture from a Qwen3 config.json."""
    config_fields.check(hf, read=["sliding_window"])  # of effect only with use_sliding_window, which is refused
    return config_fields.decoder(hf) | dict(qk_norm=True, head_dim=config_fields.given(hf, "head_dim"))
