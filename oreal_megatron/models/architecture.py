"""What a decoder looks like, whichever framework holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from oreal_megatron.config import ConfigError
from oreal_megatron.models import config_fields, internlm2, internlm3, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from oreal_megatron.models.expert_fields import Experts
from oreal_megatron.models.rope import Rope
from oreal_megatron.models.tensor_names import Names


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    family: str  # transformers' prefix of its classes: "Qwen2"
    layers: int
    hidden: int
    ffn: int  # of one expert where there are experts
    heads: int
    kv_groups: int
    head_dim: int
    vocab: int
    max_positions: int
    rope: Rope
    norm_epsilon: float
    tied: bool  # input embedding and output layer share one matrix
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: Experts | None = None  # in every layer
    names: Names = Names()

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Vocabulary rounded up so that every tensor-parallel rank holds the same multiple of 64 rows."""
        unit = 64 * tensor_parallel
        return -(-self.vocab // unit) * unit

    def stage_layers(self, stages: int, stage: int) -> range:
        """Global indices of the layers on one pipeline stage; interleaved chunks count as stages."""
        share = self.layers // stages
        return range(stage * share, (stage + 1) * share)

    def check_layout(self, tensor: int, pipeline: int, virtual: int = 1) -> None:
        """Refuse layouts that Megatron or the weight mapping cannot cut evenly."""
        for what, amount, parts, key in (
            ("attention heads", self.heads, tensor, "tensor"),
            ("feed-forward units", self.ffn, tensor, "tensor"),
            ("layers", self.layers, pipeline, "pipeline"),
        ):
            if amount % parts:
                raise ConfigError(
                    f"the model's {amount} {what} cannot be shared evenly by {parts} {key}-parallel ranks; "
                    f"set parallel.{key} to a divisor of {amount}"
                )
        if self.kv_groups % tensor and tensor % self.kv_groups:
            raise ConfigError(
                f"the model's {self.kv_groups} key-value groups can neither be shared evenly by {tensor} "
                "tensor-parallel ranks nor the ranks by the groups; set parallel.tensor to a divisor or a multiple"
            )
        if virtual > 1 and pipeline == 1:
            raise ConfigError(f"parallel.virtual is {virtual}, which needs parallel.pipeline of at least 2")
        if self.layers % (pipeline * virtual):
            raise ConfigError(
                f"the model's {self.layers} layers cannot be shared evenly by {pipeline} pipeline stages of {virtual} "
                "chunks each; set parallel.virtual so that the product divides the layers"
            )

    def check_training(self, tensor: int, sequence: bool) -> None:
        """Refuse what Megatron does not train."""
        if self.experts and tensor > 1 and not sequence:
            raise ConfigError(
                f"parallel.tensor is {tensor}, but Megatron-core trains mixtures of experts on tensor-parallel ranks "
                "only with sequence parallelism; set parallel.sequence"
            )


# By transformers' prefix of the family's classes.
FAMILIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "Qwen2": qwen2.read,
    "Qwen3": qwen3.read,
    "Llama": llama.read,
    "Mistral": mistral.read,
    "Qwen3Moe": qwen3_moe.read,
    "Mixtral": mixtral.read,
    "InternLM2": internlm2.read,
    "InternLM3": internlm3.read,
}
HEADS = {"ForCausalLM": "lm", "ForTokenClassification": "scalar"}


def read(hf: dict[str, Any]) -> Architecture:
    """The architecture of a Hugging Face config.json; refuses what is not supported, by name."""
    family, _ = _named(hf)
    try:
        return Architecture(family=family, **FAMILIES[family](hf))
    except KeyError as missing:
        raise ConfigError(f"config.json of the {family} model lacks the field {missing}") from None


def head(hf: dict[str, Any]) -> str:
    """ "lm" for a language model, "scalar" for a token-level reward model."""
    return HEADS[_named(hf)[1]]


def with_head(hf: dict[str, Any], head: str) -> dict[str, Any]:
    """The config.json of the same model with a language-model or a scalar head."""
    suffix = next(suffix for suffix, kind in HEADS.items() if kind == head)
    named = hf | {"architectures": [_named(hf)[0] + suffix]}
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1, "classifier_dropout": 0.0}
    return named | labels if head == "scalar" else {key: value for key, value in named.items() if key not in labels}


def _named(hf: dict[str, Any]) -> tuple[str, str]:
    name = config_fields.named(hf)
    for suffix in HEADS:
        if name.removesuffix(suffix) in FAMILIES and name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    supported = ", ".join(family + suffix for suffix in HEADS for family in FAMILIES)
    raise ConfigError(f"architecture {name} is not supported; supported are {supported}")
