"""Qwen3, mixture of experts: Qwen3's attention; every layer a mixture without shared experts."""

from __future__ import annotations

from typing import Any

from oreal_megatron.mapping import experts, fields
from oreal_megatron.mapping.names import Names

NAMES = Names(
    router="mlp.gate.weight",
    gate_up=("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
    down="mlp.experts.{}.down_proj",
)
READ = ("sliding_window", "moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok",
        "norm_topk_prob")  # fmt: skip


def read(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of Architecture from a Qwen3-MoE config.json; `intermediate_size` is of dense layers, which it has not."""
    fields.check(hf, READ)  # sliding_window: of effect only with use_sliding_window, which is refused
    return fields.decoder(hf) | dict(
        qk_norm=True,
        head_dim=fields.given(hf, "head_dim"),
        ffn=fields.given(hf, "moe_intermediate_size"),
        experts=experts.read(hf, normalised=fields.given(hf, "norm_topk_prob")),
        names=NAMES,
    )
