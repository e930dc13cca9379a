"""Reading of a Hugging Face config.json such that no field that changes the computation is ignored.

A field is read by its family, or known to change nothing, or supported at its neutral value only. Any other field that
is not null is rejected by name: a converter that skips unknown fields writes wrong models silently.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from oreal_megatron.config import ConfigError
from oreal_megatron.models import rope

HFConfig = dict[str, Any]  # a parsed config.json
ArchitectureFields = dict[str, Any]  # keyword arguments of Architecture

READ = frozenset(
    "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size "
    "max_position_embeddings rms_norm_eps tie_word_embeddings architectures rope_theta rope_scaling rope_parameters "
    "layer_types num_labels id2label label2id".split()
)
# Bookkeeping, special tokens, initialisation, caching, and unused features: dropout and load-balancing losses.
HARMLESS = frozenset(
    "model_type torch_dtype dtype transformers_version transformers.js_config auto_map attn_implementation use_cache "
    "bos_token_id eos_token_id pad_token_id unk_token_id initializer_range attention_dropout hidden_dropout "
    "resid_pdrop classifier_dropout problem_type output_attentions output_hidden_states return_dict "
    "chunk_size_feed_forward is_encoder_decoder is_llama_config task_specific_params finetuning_task "
    "keys_to_ignore_at_inference use_bfloat16 max_window_layers cache_implementation output_router_logits "
    "router_aux_loss_coef".split()
)
REQUIRED_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
                  "num_key_value_heads", "vocab_size", "max_position_embeddings")  # fmt: skip
# Types of the fields that are read, where they are there.
POSITIVE_INTEGERS = (*REQUIRED_SIZES, "head_dim", "sliding_window", "moe_intermediate_size", "num_experts",
                     "num_local_experts", "num_experts_per_tok", "num_labels")  # fmt: skip
POSITIVE_NUMBERS = ("rms_norm_eps",)
SWITCHES = ("tie_word_embeddings", "qkv_bias", "norm_topk_prob")
NEUTRAL: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "bias": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "use_mrope": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "token_classification_bias": True,  # the bias must be zero, which is checked when it is read
    "sliding_window": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_jitter_noise": 0.0,
    "shared_expert_intermediate_size": 0,
    "num_shared_experts": 0,
    "n_shared_experts": 0,
    "quantization_config": None,
}


def check(hf: HFConfig, read: Iterable[str] = ()) -> None:
    """Raise ConfigError for a field that neither the family (`read`) nor this module knows."""
    check_types(hf)
    for key, value in hf.items():
        if value is None or key.startswith("_") or key in READ or key in HARMLESS or key in read:
            continue
        if key not in NEUTRAL:
            raise ConfigError(
                f"config.json has {key} = {value!r}, which is unknown for this model family; if it changes "
                "nothing, remove it from config.json, otherwise the model is not supported"
            )
        if value != NEUTRAL[key]:
            raise ConfigError(f"config.json has {key} = {value!r}; only {NEUTRAL[key]!r} is supported")
    layer_types = hf.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ConfigError(f"config.json has layer_types = {layer_types!r:.200}; supported: full_attention")
    if is_reward_model(hf) and hf.get("num_labels", len(hf.get("id2label") or "01")) != 1:
        raise ConfigError("config.json has several labels; a token-level reward model needs num_labels 1")


def check_types(hf: HFConfig) -> None:
    """Raise ConfigError for a field that is read and holds another type, or a size below 1."""
    for key in POSITIVE_INTEGERS:
        if hf.get(key) is not None and (type(hf[key]) is not int or hf[key] < 1):
            raise ConfigError(f"config.json has {key} = {hf[key]!r}; expected an integer above 0")
    for key in POSITIVE_NUMBERS:
        if hf.get(key) is not None and (type(hf[key]) not in (int, float) or not 0 < hf[key] < math.inf):
            raise ConfigError(f"config.json has {key} = {hf[key]!r}; expected a number above 0")
    for key in SWITCHES:
        if hf.get(key) is not None and type(hf[key]) is not bool:
            raise ConfigError(f"config.json has {key} = {hf[key]!r}; expected true or false")


def is_reward_model(hf: HFConfig) -> bool:
    """Return whether the model is a token-level reward model."""
    return architecture_name(hf).endswith("ForTokenClassification")


def architecture_name(hf: HFConfig) -> str:
    """Return the name of the model's class in transformers."""
    names = hf.get("architectures")
    return str(names[0]) if names and isinstance(names, list) else "(none named)"


def require(hf: HFConfig, key: str) -> Any:
    """Return a field whose default in transformers fits few models; KeyError where it is missing or null."""
    if hf.get(key) is None:
        raise KeyError(key)
    return hf[key]


def decoder(hf: HFConfig, default_theta: float = 10000.0, default_epsilon: float = 1e-6) -> ArchitectureFields:
    """Return the fields of Architecture that all families name alike; KeyError where one is missing.

    Defaults are those of transformers for a family whose config.json lacks rope_theta or rms_norm_eps.
    """
    for key in REQUIRED_SIZES:
        require(hf, key)
    check_types(hf)
    heads, groups = hf["num_attention_heads"], hf["num_key_value_heads"]
    if heads % groups:
        raise ConfigError(
            f"config.json has {heads} attention heads, which {groups} key-value heads cannot share evenly"
        )
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    if head_dim < 2 or head_dim % 2:
        raise ConfigError(f"config.json has a head_dim of {head_dim}; rotary embeddings need an even number")
    return dict(
        layers=hf["num_hidden_layers"],
        hidden=hf["hidden_size"],
        ffn=hf["intermediate_size"],
        heads=heads,
        kv_groups=groups,
        head_dim=head_dim,
        vocab=hf["vocab_size"],
        max_positions=hf["max_position_embeddings"],
        rope=rope.read(hf, default_theta),
        norm_epsilon=default_epsilon if hf.get("rms_norm_eps") is None else hf["rms_norm_eps"],
        tied=bool(hf.get("tie_word_embeddings", False)),
    )
