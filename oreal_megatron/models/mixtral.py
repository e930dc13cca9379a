"""Mixtral: Mistral's attention; every layer a mixture of experts."""

from __future__ import annotations

from oreal_megatron.models import config_fields, expert_fields, mistral
from oreal_megatron.models.config_fields import ArchitectureFields, HFConfig
from oreal_megatron.models.tensor_names import TensorNames

NAMES = TensorNames(
    router="block_sparse_moe.gate.weight",
    gate_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
    down="block_sparse_moe.experts.{}.w2",
)


def read(hf: HFConfig) -> ArchitectureFields:
    """Return the fields of Architecture from a Mixtral config.json; the weights of a token's experts add up to one."""
    config_fields.check(hf, read=["sliding_window", "num_local_experts", "num_experts", "num_experts_per_tok"])
    arch = config_fields.decoder(hf, default_theta=1e6, default_epsilon=1e-5)
    mistral.check_window(hf.get("sliding_window"), arch["max_positions"])
    return arch | dict(experts=expert_fields.read(hf, normalised=True), names=NAMES)
