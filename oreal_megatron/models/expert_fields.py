"""Fields of config.json about mixtures of experts, which replace the feed-forward blocks."""

from __future__ import annotations

from dataclasses import dataclass

from oreal_megatron.config import ConfigError
from oreal_megatron.models import config_fields
from oreal_megatron.models.config_fields import HFConfig

COUNT_KEYS = ("num_experts", "num_local_experts")  # transformers 5 writes the second for families that had the first


@dataclass(frozen=True, slots=True)
class Experts:
    """Mixture of every layer: a router selects `per_token` of `count` gated blocks by the softmax of its scores."""

    count: int
    per_token: int
    normalised: bool  # the selected experts' weights add up to one; otherwise to their share of the softmax


def read(hf: HFConfig, normalised: bool) -> Experts:
    """Read the mixture of a config.json; ConfigError where its fields contradict each other."""
    counts = {key: hf[key] for key in COUNT_KEYS if hf.get(key) is not None}
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"config.json has {' and '.join(f'{key} = {count}' for key, count in counts.items())}, which differ"
        )
    count = next(iter(counts.values())) if counts else config_fields.require(hf, COUNT_KEYS[0])
    per_token = config_fields.require(hf, "num_experts_per_tok")
    if not 1 <= per_token <= count:
        raise ConfigError(
            f"config.json has num_experts_per_tok = {per_token} of {count} experts; expected 1 to {count}"
        )
    if normalised and per_token == 1:
        raise ConfigError(
            "config.json has num_experts_per_tok = 1 with normalised weights: the only weight is always 1, and "
            "Megatron-core cannot train such a router"
        )
    return Experts(count, per_token, normalised)
