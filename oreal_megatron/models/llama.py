"""Llama 2, 3, 3.1 and 3.2 (text): no biases; from 3.1 on, rotary frequencies scaled by parts."""

from __future__ import annotations

from oreal_megatron.models import config_fields
from oreal_megatron.models.config_fields import ArchitectureFields, HFConfig


def read(hf: HFConfig) -> ArchitectureFields:
    """Return the fields of Architecture from a Llama config.json. `num_key_value_heads` defaults to all heads."""
    config_fields.check(hf)
    return config_fields.decoder(
        hf | {"num_key_value_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"]}
    )
