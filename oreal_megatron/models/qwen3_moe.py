"""Qwen3, mixture of experts: Qwen3's attention; every layer a mixture without shared experts."""

from __future__ import annotations

from oreal_megatron.models import config_fields, expert_fields
from oreal_megatron.models.config_fields import ArchitectureFields, HFConfig
from oreal_megatron.models.tensor_names import TensorNames

NAMES = TensorNames(
    router="mlp.gate.weight",
    gate_up=("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
    down="mlp.experts.{}.down_proj",
)
READ = ("sliding_window", "moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok",
        "norm_topk_prob")  # fmt: skip


def read(hf: HFConfig) -> ArchitectureFields:
    """Return the fields of Architecture from a Qwen3-MoE config.json. It has no dense `intermediate_size`."""
    config_fields.check(hf, READ)  # sliding_window: has an effect only with use_sliding_window, which is rejected
    return config_fields.decoder(hf) | dict(
        qk_norm=True,
        head_dim=config_fields.require(hf, "head_dim"),
        ffn=config_fields.require(hf, "moe_intermediate_size"),
        experts=expert_fields.read(hf, normalised=config_fields.require(hf, "norm_topk_prob")),
        names=NAMES,
    )
