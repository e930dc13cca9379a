"""Rotary embeddings: what config.json says about them, and the frequencies that follow.

The frequencies are computed here and put into Megatron's model, because Megatron-core 0.16.1 fixes three of the four
numbers of Llama 3's scaling. Formulas: Su et al., arXiv 2104.09864 (plain); Chen et al., arXiv 2306.15595 (linear);
Grattafiori et al., arXiv 2407.21783, section 3.2, and the Llama 3.1 model card (by parts).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oreal_megatron.config import ConfigError

# What each kind reads, beside rope_theta. YaRN and longrope also rescale attention, which is not supported.
FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one model. Dynamic scaling begins beyond `max_positions`, so within them it is plain."""

    theta: float = 10000.0
    kind: str = "default"  # a key of FIELDS
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0

    def frequencies(self, head_dim: int) -> Tensor:
        """Radians per position of each pair of dimensions, [head_dim / 2] float32."""
        plain = 1.0 / self.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        if self.kind == "linear":
            return plain / self.factor
        return self._by_parts(plain) if self.kind == "llama3" else plain

    def _by_parts(self, plain: Tensor) -> Tensor:
        """Short waves stay, long ones are stretched by `factor`, those between are blended."""
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)  # over the original context
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * plain / self.factor + kept * plain


def read(hf: dict[str, Any]) -> Rope:
    """The rotary embedding of a config.json in transformers' current form (rope_parameters) or the one before."""
    said = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    older = said.pop("type", "default")
    kind = said.pop("rope_type", older)
    theta = float(said.pop("rope_theta", hf.get("rope_theta") or 10000.0))
    if kind not in FIELDS:
        raise ConfigError(f"rope type {kind!r} in config.json is not supported; supported are {', '.join(FIELDS)}")
    if missing := [name for name in FIELDS[kind] if name not in said]:
        raise ConfigError(f"rope type {kind!r} in config.json lacks {', '.join(missing)}")
    values = {name: said.pop(name) for name in FIELDS[kind]}
    if said.get("partial_rotary_factor", 1.0) == 1.0:
        said.pop("partial_rotary_factor", None)
    if unknown := [name for name, value in said.items() if value is not None]:
        raise ConfigError(f"rope type {kind!r} in config.json has {', '.join(unknown)}, which is not supported")
    return Rope(theta, kind, **values)
