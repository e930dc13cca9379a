"""Specification of one transformer layer: Megatron's local modules or Transformer Engine's, with our replacements."""

from __future__ import annotations

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import ModuleSpec

from oreal_megatron.config import Config, ConfigError
from oreal_megatron.mcore import megatron_patches
from oreal_megatron.mcore.layers import PackedAttention, RMSNorm
from oreal_megatron.models.architecture import Architecture


def layer_spec(arch: Architecture, config: Config) -> ModuleSpec:
    """Return Megatron's transformer layer with our norms and core attention, or with Transformer Engine's modules."""
    megatron_patches.use_own_weight_gradient()
    experts = arch.experts.count if arch.experts else None
    if config.model.layers == "local":
        spec = gpt_layer_specs.get_gpt_layer_local_spec(experts, qk_layernorm=arch.qk_norm, normalization="RMSNorm")
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        attention: type = PackedAttention
    else:
        if not gpt_layer_specs.HAVE_TE:
            raise ConfigError(
                'model.layers is "transformer_engine", but Transformer Engine cannot be imported here; install '
                'transformer-engine[pytorch], or set model.layers to "local"'
            )
        from oreal_megatron.mcore import transformer_engine

        spec = transformer_engine.layer_spec(arch.qk_norm, experts)
        # Under context parallelism Transformer Engine cuts every sequence by itself, we cut the whole pack.
        attention = transformer_engine.Attention if config.parallel.context == 1 else PackedAttention
    inner = spec.submodules.self_attention.submodules
    inner.core_attention = attention
    if arch.qk_norm:
        inner.q_layernorm = inner.k_layernorm = RMSNorm
    return spec
