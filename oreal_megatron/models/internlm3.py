"""InternLM3: Llama's names, with optional biases on query, key and value."""

from __future__ import annotations

from oreal_megatron.models import config_fields
from oreal_megatron.models.config_fields import ArchitectureFields, HFConfig


def read(hf: HFConfig) -> ArchitectureFields:
    """Return the fields of Architecture from an InternLM3 config.json; `bias` (of the other layers) must be false."""
    config_fields.check(hf, read=["qkv_bias"])
    return config_fields.decoder(hf) | dict(qkv_bias=bool(hf.get("qkv_bias", False)))
