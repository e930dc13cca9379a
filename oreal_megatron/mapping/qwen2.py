"""Qwen2 and Qwen2.5: biases on query, key and value; plain rotary embeddings."""

from __future__ import annotations

from typing import Any

from oreal_megatron.config import ConfigError


def read(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of Architecture from a Qwen2 config.json."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5 and 4
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ConfigError(f"rope type {rope.get('rope_type', rope.get('type'))!r} is not supported for Qwen2")
    if hf.get("use_sliding_window"):
        raise ConfigError("use_sliding_window is true in config.json; sliding-window attention is not supported")
    if hf.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act is {hf['hidden_act']!r}; Qwen2 needs 'silu'")
    return dict(
        family="qwen2",
        layers=hf["num_hidden_layers"],
        hidden=hf["hidden_size"],
        ffn=hf["intermediate_size"],
        heads=hf["num_attention_heads"],
        kv_groups=hf.get("num_key_value_heads", hf["num_attention_heads"]),
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        vocab=hf["vocab_size"],
        max_positions=hf["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
        norm_epsilon=hf.get("rms_norm_eps", 1e-6),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=True,
    )
