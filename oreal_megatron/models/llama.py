"""Llama 2, 3, 3.1 and 3.2 (text): no biases; from 3.1 on, rotary frequencies scaled by parts."""

from __future__ import annotations

from typing import Any

from oreal_megatron.models import config_fields


def read(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of Architecture from a Llama config.json; without num_key_value_heads every head has its own."""
    config_fields.check(hf)
    return config_fields.decoder(
        hf | {"num_key_value_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"]}
    )
