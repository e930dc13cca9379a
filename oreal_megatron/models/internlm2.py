"""InternLM2 and 2.5: query, key and value in one tensor, already in Megatron's order; with its own tensor names."""

from __future__ import annotations

from oreal_megatron.models import config_fields
from oreal_megatron.models.config_fields import ArchitectureFields, HFConfig
from oreal_megatron.models.tensor_names import TensorNames

NAMES = TensorNames(
    embedding="model.tok_embeddings.weight",
    output="output.weight",
    input_norm="attention_norm.weight",
    qkv=("attention.wqkv",),
    proj="attention.wo",
    mlp_norm="ffn_norm.weight",
    gate_up=("feed_forward.w1", "feed_forward.w3"),
    down="feed_forward.w2",
)


def read(hf: HFConfig) -> ArchitectureFields:
    """Return the fields of Architecture from an InternLM2 config.json. `num_key_value_heads` defaults to all heads."""
    config_fields.check(hf)
    groups = hf.get("num_key_value_heads") or hf["num_attention_heads"]
    return config_fields.decoder(hf | {"num_key_value_heads": groups}) | dict(names=NAMES)
