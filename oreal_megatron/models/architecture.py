"""Architecture of a decoder, independent of the framework that holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from oreal_megatron.config import ConfigError
from oreal_megatron.models import config_fields, internlm2, internlm3, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from oreal_megatron.models.config_fields import ArchitectureFields, HFConfig
from oreal_megatron.models.expert_fields import Experts
from oreal_megatron.models.rope import Rope
from oreal_megatron.models.tensor_names import TensorNames


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Sizes and switches of a decoder; `read` makes one from config.json."""

    family: str  # transformers' prefix of its classes: "Qwen2"
    layers: int
    hidden: int
    ffn: int  # hidden units of the feed-forward block, or of one expert
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
    names: TensorNames = TensorNames()

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Return the vocabulary padded so that every tensor-parallel rank holds the same multiple of 64 rows."""
        unit = 64 * tensor_parallel
        return -(-self.vocab // unit) * unit

    def stage_layers(self, stages: int, stage: int) -> range:
        """Return the global indices of the layers on one pipeline stage; interleaved chunks count as stages."""
        share = self.layers // stages
        return range(stage * share, (stage + 1) * share)

    def check_layout(self, tensor: int, pipeline: int, virtual: int = 1) -> None:
        """Raise ConfigError for a layout that Megatron or the weight mapping cannot split evenly."""
        for key, flag, size in (
            ("tensor", "--tp", tensor),
            ("pipeline", "--pp", pipeline),
            ("virtual", "--vpp", virtual),
        ):
            if size < 1:
                raise ConfigError(f"parallel.{key} ({flag} of `oreal convert`) is {size}; expected at least 1")
        for unit, amount, parts, key, flag in (
            ("attention heads", self.heads, tensor, "tensor", "--tp"),
            ("feed-forward units", self.ffn, tensor, "tensor", "--tp"),
            ("layers", self.layers, pipeline, "pipeline", "--pp"),
        ):
            if amount % parts:
                raise ConfigError(
                    f"the model's {amount} {unit} cannot be split evenly over {parts} {key}-parallel ranks; "
                    f"set parallel.{key} ({flag} of `oreal convert`) to a divisor of {amount}"
                )
        if self.kv_groups % tensor and tensor % self.kv_groups:
            raise ConfigError(
                f"the model's {self.kv_groups} key-value groups and {tensor} tensor-parallel ranks: neither number "
                "divides the other; set parallel.tensor (--tp of `oreal convert`) to a divisor or a multiple"
            )
        if virtual > 1 and pipeline == 1:
            raise ConfigError(
                f"parallel.virtual (--vpp of `oreal convert`) is {virtual}, which needs parallel.pipeline (--pp) of at "
                "least 2"
            )
        if self.layers % (pipeline * virtual):
            raise ConfigError(
                f"the model's {self.layers} layers cannot be split evenly over {pipeline} pipeline stages of {virtual} "
                "chunks each; set parallel.virtual (--vpp of `oreal convert`) so that the product divides the layers"
            )

    def check_training(self, tensor: int, sequence: bool) -> None:
        """Raise ConfigError for a layout that Megatron does not train."""
        if self.experts and tensor > 1 and not sequence:
            raise ConfigError(
                f"parallel.tensor is {tensor}, but Megatron-core trains mixtures of experts on tensor-parallel ranks "
                "only with sequence parallelism; set parallel.sequence=true"
            )


# By transformers' prefix of the family's classes.
FAMILIES: dict[str, Callable[[HFConfig], ArchitectureFields]] = {
    "Qwen2": qwen2.read,
    "Qwen3": qwen3.read,
    "Llama": llama.read,
    "Mistral": mistral.read,
    "Qwen3Moe": qwen3_moe.read,
    "Mixtral": mixtral.read,
    "InternLM2": internlm2.read,
    "InternLM3": internlm3.read,
}
MODEL_TYPES = {family: "qwen3_moe" if family == "Qwen3Moe" else family.lower() for family in FAMILIES}
HEADS = {"ForCausalLM": "lm", "ForTokenClassification": "scalar"}


def read(hf: HFConfig) -> Architecture:
    """Return the architecture of a Hugging Face config.json; ConfigError names a field that is not supported."""
    family, _ = _family_and_head(hf)
    try:
        return Architecture(family=family, **FAMILIES[family](hf))
    except KeyError as error:
        raise ConfigError(f"config.json of the {family} model lacks the field {error}") from None


def head(hf: HFConfig) -> str:
    """Return "lm" for a language model, "scalar" for a token-level reward model."""
    return HEADS[_family_and_head(hf)[1]]


def with_head(hf: HFConfig, head: str) -> HFConfig:
    """Return the config.json of the same model with a language-model or a scalar head."""
    suffix = next(suffix for suffix, kind in HEADS.items() if kind == head)
    config = hf | {"architectures": [_family_and_head(hf)[0] + suffix]}
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1, "classifier_dropout": 0.0}
    return config | labels if head == "scalar" else {key: value for key, value in config.items() if key not in labels}


def _family_and_head(hf: HFConfig) -> tuple[str, str]:
    """Return the family and the suffix of the model's class; ConfigError where it is not supported."""
    name = config_fields.architecture_name(hf)
    for suffix in HEADS:
        if name.removesuffix(suffix) in FAMILIES and name.endswith(suffix):
            _check_model_type(hf, name.removesuffix(suffix))
            return name.removesuffix(suffix), suffix
    supported = ", ".join(family + suffix for suffix in HEADS for family in FAMILIES)
    raise ConfigError(f"architecture {name} is not supported; supported: {supported}")


def _check_model_type(hf: HFConfig, family: str) -> None:
    """Raise ConfigError where model_type names another family, so that readers of the folder load different models.

    transformers chooses the class by model_type, vLLM by architectures.
    """
    if hf.get("model_type") not in (None, MODEL_TYPES[family]):
        raise ConfigError(
            f"config.json has model_type {hf['model_type']!r:.80}, by which transformers loads a model, and "
            f"architectures {hf['architectures'][0]}, by which vLLM does; expected model_type {MODEL_TYPES[family]!r}. "
            "Correct the one that is not of these weights"
        )
