"""Checks of the fields of `config.megatron` against Megatron's TransformerConfig, which checks no types itself."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Container, Mapping
from typing import Any, Literal

from megatron.core.transformer import TransformerConfig

from oreal_megatron.config import ConfigError, schema
from oreal_megatron.config.suggestions import suggest

# Checkpoints, weight sync and conversion know the tensors of a rank from the model's config.json and an even split.
UNEVEN_STAGES = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)
OTHER_TENSORS = (
    "attention_output_gate",
    "experimental_attention_variant",
    "heterogeneous_block_specs",
    "hetereogenous_dist_checkpoint",
    "is_hybrid_model",
    "layernorm_zero_centered_gamma",
    "linear_attention_freq",
    "moe_latent_size",
    "moe_layer_freq",
    "moe_router_enable_expert_bias",
    "moe_shared_expert_gate",
    "moe_shared_expert_intermediate_size",
    "mtp_num_layers",
    "mtp_standalone",
    "multi_latent_attention",
    "num_moe_experts",
    "softmax_type",
)


def check_fields(fields: Mapping[str, Any], derived: Container[str]) -> None:
    """Raise ConfigError for a field that is unknown, in `derived`, of another type, or changes a rank's tensors."""
    hints = typing.get_type_hints(TransformerConfig)
    known = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    for name, value in fields.items():
        if name not in known:
            raise ConfigError(f"config.megatron: TransformerConfig has no field {name!r}{suggest(name, list(known))}")
        if name in derived:
            raise ConfigError(
                f"config.megatron: {name} is derived from the model and the other sections; set those instead"
            )
        if _is_plain(hints[name]) and (problem := schema.type_problem(f"megatron.{name}", value, hints[name])):
            raise ConfigError(problem)
        if value != known[name]:
            _refuse_other_tensors(name, value)


def _refuse_other_tensors(name: str, value: object) -> None:
    """Raise ConfigError for a field that gives a rank other layers, or a layer other tensors, than are written."""
    if name in UNEVEN_STAGES:
        raise ConfigError(
            f"config.megatron: {name} is {value!r}, but checkpoints and weight sync expect equally many layers on "
            "every pipeline stage; remove it, and choose a parallel.pipeline that divides the layers"
        )
    if name in OTHER_TENSORS:
        raise ConfigError(
            f"config.megatron: {name} is {value!r}, which gives the model other tensors than its config.json; remove "
            "it, the model's own tensors are those that the engine and checkpoints hold"
        )


def _is_plain(hint: Any) -> bool:
    """Return whether an annotation has only numbers, texts, true, false, None, choices of them, and lists of them."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is list or origin in schema.UNIONS:
        return all(map(_is_plain, args))
    return origin is Literal or hint in schema.TYPE_NAMES
