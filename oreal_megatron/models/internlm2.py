"""InternLM2 and 2.5: query, key and value in one tensor, already in Megatron's order; names of its own."""

from __future__ import annotations

from typing import Any

from oreal_megatron.models import config_fields
from oreal_megatron.models.tensor_names import Names

NAMES = Names(
    embedding="model.tok_embeddings.weight",
    output="output.weight",
    input_norm="attention_norm.weight",
    qkv=("attention.wqkv",),
    proj="attention.wo",
    mlp_norm="ffn_norm.weight",
    gate_up=("feed_forward.w1", "feed_forward.w3"),
    down="feed_forward.w2",
)


def read(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of Architecture from an InternLM2 config.json; without num_key_value_heads every head has its own."""
    config_fields.check(hf)
    groups = hf.get("num_key_value_heads") or hf["num_attention_heads"]
    return config_fields.decoder(hf | {"num_key_value_heads": groups}) | dict(names=NAMES)
