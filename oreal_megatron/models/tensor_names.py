"""Hugging Face tensor names of a decoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Names in one family's files; the defaults are Llama's, which most families share.

    `qkv` names three tensors, or one that holds for each key-value group its queries, its key and its value. Names of
    linear layers lack ".weight" and ".bias". In a mixture of experts, {} stands for the number of the expert.
    """

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    output: str = "lm_head.weight"
    score: str = "score"
    layer: str = "model.layers."  # followed by the number, a dot and one of the names below
    input_norm: str = "input_layernorm.weight"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    proj: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm.weight"
    router: str = ""  # mixtures of experts only
    gate_up: tuple[str, str] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
