"""Configuration of Megatron-core's mixtures of experts.

Every rank holds all experts, each cut over the tensor-parallel ranks (expert parallelism 1); no load-balancing loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oreal_megatron.config import ConfigError
from oreal_megatron.models.architecture import Architecture


def refuse_expert_parallelism(megatron: Mapping[str, Any]) -> None:
    """Raise ConfigError if the fields that a recipe passes through to Megatron ask for expert parallelism."""
    for key in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        if key in megatron:
            raise ConfigError(
                f"config.megatron has {key}, but expert parallelism is not supported; remove it, every rank then holds "
                "all experts and tensor-parallel ranks share each of them"
            )


def transformer_fields(arch: Architecture) -> dict[str, Any]:
    """Return the fields of TransformerConfig that follow from the experts; none for a dense model."""
    if not arch.experts:
        return {}
    return dict(
        num_moe_experts=arch.experts.count,
        moe_router_topk=arch.experts.per_token,
        moe_ffn_hidden_size=arch.ffn,
        # The softmax of the top scores equals the softmax of all scores, restricted to the top and normalised.
        moe_router_pre_softmax=not arch.experts.normalised,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_grouped_gemm=False,
    )
