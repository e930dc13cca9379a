"""What a Hugging Face config.json says, read so that nothing which changes the computation is passed over.

A field is read by its family, or known to change nothing, or known to change the computation in a way that is not
supported unless it has its neutral value. Any other field that is not null is refused by name: a converter that
skips what it does not know writes wrong models silently.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from oreal_megatron.config import ConfigError
from oreal_megatron.models import rope

READ = frozenset(
    "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size "
    "max_position_embeddings rms_norm_eps tie_word_embeddings architectures rope_theta rope_scaling rope_parameters "
    "layer_types num_labels id2label label2id".split()
)
# Bookkeeping, special tokens, initialisation, caching, and what is never used here: dropout and load-balancing losses.
HARMLESS = frozenset(
    "model_type torch_dtype dtype transformers_version transformers.js_config auto_map attn_implementation use_cache "
    "bos_token_id eos_token_id pad_token_id unk_token_id initializer_range attention_dropout hidden_dropout "
    "resid_pdrop classifier_dropout problem_type output_attentions output_hidden_states return_dict "
    "chunk_size_feed_forward is_encoder_decoder is_llama_config task_specific_params finetuning_task "
    "keys_to_ignore_at_inference use_bfloat16 max_window_layers cache_implementation output_router_logits "
    "router_aux_loss_coef".split()
)
WHOLE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
         "vocab_size", "max_position_embeddings")  # fmt: skip
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
    "token_classification_bias": True,  # such a bias must be zero, which is checked when it is read
    "sliding_window": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_jitter_noise": 0.0,
    "shared_expert_intermediate_size": 0,
    "num_shared_experts": 0,
    "n_shared_experts": 0,
    "quantization_config": None,
}


def check(hf: dict[str, Any], read: Iterable[str] = ()) -> None:
    """Refuse, by name, a field that neither the family (`read`) nor this file knows to be without effect."""
    for key, value in hf.items():
        if value is None or key.startswith("_") or key in READ or key in HARMLESS or key in read:
            continue
        if key not in NEUTRAL:
            raise ConfigError(
                f"config.json has {key} = {value!r}, which this model family does not know; if it changes nothing, "
                "take it out of config.json, otherwise the model is not supported"
            )
        if value != NEUTRAL[key]:
            raise ConfigError(f"config.json has {key} = {value!r}; supported is only {NEUTRAL[key]!r}")
    if set(hf.get("layer_types") or ()) - {"full_attention"}:
        raise ConfigError(f"config.json has layer_types {sorted(set(hf['layer_types']))}; supported: full_attention")
    if is_reward_model(hf) and hf.get("num_labels", len(hf.get("id2label") or "01")) != 1:
        raise ConfigError("config.json names several labels; a token-level reward model has num_labels 1")


def is_reward_model(hf: dict[str, Any]) -> bool:
    return named(hf).endswith("ForTokenClassification")


def named(hf: dict[str, Any]) -> str:
    """The class of transformers that the model is one of."""
    names = hf.get("architectures")
    return str(names[0]) if names and isinstance(names, list) else "(none named)"


def given(hf: dict[str, Any], key: str) -> Any:
    """A field for which transformers has a default that fits few models: it must be there and not null."""
    if hf.get(key) is None:
        raise KeyError(key)
    return hf[key]


def decoder(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields of Architecture that all families name alike; a missing one is a KeyError."""
    for key in WHOLE:
        if not isinstance(given(hf, key), int) or hf[key] < 1:
            raise ConfigError(f"config.json has {key} = {hf[key]!r}; wanted a whole number above 0")
    heads = hf["num_attention_heads"]
    return dict(
        layers=hf["num_hidden_layers"],
        hidden=hf["hidden_size"],
        ffn=hf["intermediate_size"],
        heads=heads,
        kv_groups=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        vocab=hf["vocab_size"],
        max_positions=hf["max_position_embeddings"],
        rope=rope.read(hf),
        norm_epsilon=hf.get("rms_norm_eps", 1e-6),
        tied=bool(hf.get("tie_word_embeddings", False)),
    )
