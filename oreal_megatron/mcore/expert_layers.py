"""Mixtures of experts as Megatron-core runs them: its configuration, and what 0.16.1 lacks without a GPU.

Every rank holds all experts, each cut over the tensor-parallel ranks (expert parallelism 1); no load-balancing loss.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from oreal_megatron.config import ConfigError
from oreal_megatron.models.architecture import Architecture


def check(megatron: dict[str, Any]) -> None:
    """Refuse expert parallelism among the fields that a recipe passes through to Megatron."""
    for key in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        if key in megatron:
            raise ConfigError(
                f"config.megatron has {key}: expert parallelism is not supported; leave it out, every rank then holds "
                "all experts and tensor-parallel ranks share each of them"
            )


def fields(arch: Architecture) -> dict[str, Any]:
    """Fields of TransformerConfig that follow from the experts; none for a dense model."""
    if not arch.experts:
        return {}
    return dict(
        num_moe_experts=arch.experts.count,
        moe_router_topk=arch.experts.per_token,
        moe_ffn_hidden_size=arch.ffn,
        # The softmax of the picked scores is the softmax of all scores, picked and normalised.
        moe_router_pre_softmax=not arch.experts.normalised,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_grouped_gemm=False,
    )


def prepare() -> None:
    """Let Megatron-core's experts run without Transformer Engine and, on CPUs, without CUDA streams."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # asked for by the router even where it could not be imported
    if not torch.cuda.is_available():
        MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "none"
        MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _already_here


def _already_here(dispatcher: Any, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
    """On CPUs nothing has to be copied from a device."""
    return tokens_per_expert
