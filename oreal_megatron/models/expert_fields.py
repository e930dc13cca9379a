"""Mixtures of experts in place of the feed-forward blocks: what config.json says about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oreal_megatron.config import ConfigError
from oreal_megatron.models import config_fields

COUNT = ("num_experts", "num_local_experts")  # transformers 5 writes the second for families that had the first


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of every layer: a router picks `per_token` of `count` gated blocks by the softmax of its scores."""

    count: int
    per_token: int
    normalised: bool  # the weights of the picked experts add up to one; otherwise to their share of the softmax


def read(hf: dict[str, Any], normalised: bool) -> Experts:
    """The mixture of a config.json."""
    said = {key: hf[key] for key in COUNT if hf.get(key) is not None}
    if len(set(said.values())) > 1:
        raise ConfigError(f"config.json has {' and '.join(f'{key} = {count}' for key, count in said.items())}")
    count = next(iter(said.values())) if said else config_fields.given(hf, COUNT[0])
    per_token = config_fields.given(hf, "num_experts_per_tok")
    if not 1 <= per_token <= count:
        raise ConfigError(f"config.json has num_experts_per_tok = {per_token} of {count} experts; wanted 1 to {count}")
    if normalised and per_token == 1:
        raise ConfigError(
            "config.json has num_experts_per_tok = 1 with normalised weights: the one weight is always 1, and "
            "Megatron-core refuses to train such a router"
        )
    return Experts(count, per_token, normalised)
