"""What a dense decoder looks like, whichever framework holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from oreal_megatron.config import ConfigError
from oreal_megatron.mapping import qwen2


@dataclass(frozen=True, slots=True)
class Architecture:
    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_groups: int
    head_dim: int
    vocab: int
    max_positions: int
    rope_theta: float
    norm_epsilon: float
    tied: bool  # input embedding and output layer share one matrix
    qkv_bias: bool

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Vocabulary rounded up so that every tensor-parallel rank holds the same multiple of 64 rows."""
        unit = 64 * tensor_parallel
        return -(-self.vocab // unit) * unit

    def stage_layers(self, stages: int, stage: int) -> range:
        """Global indices of the layers on one pipeline stage."""
        share = self.layers // stages
        return range(stage * share, (stage + 1) * share)

    def check_layout(self, tensor: int, pipeline: int) -> None:
        """Refuse layouts that Megatron or the weight mapping cannot cut evenly."""
        for what, amount, parts, key in (
            ("attention heads", self.heads, tensor, "tensor"),
            ("key-value groups", self.kv_groups, tensor, "tensor"),
            ("feed-forward units", self.ffn, tensor, "tensor"),
            ("layers", self.layers, pipeline, "pipeline"),
        ):
            if amount % parts:
                raise ConfigError(
                    f"the model's {amount} {what} cannot be shared evenly by {parts} {key}-parallel ranks; "
                    f"set parallel.{key} to a divisor of {amount}"
                )


FAMILIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"Qwen2ForCausalLM": qwen2.read}


def read(hf_config: dict[str, Any]) -> Architecture:
    """The architecture of a Hugging Face config.json; refuses what is not supported, by name."""
    names = hf_config.get("architectures") or ["(none named)"]
    if names[0] not in FAMILIES:
        raise ConfigError(f"architecture {names[0]} is not supported; supported are {', '.join(FAMILIES)}")
    try:
        return Architecture(**FAMILIES[names[0]](hf_config))
    except KeyError as missing:
        raise ConfigError(f"config.json of the {names[0]} model lacks the field {missing}") from None
