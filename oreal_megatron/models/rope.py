"""Rotary embeddings: fields of config.json and the frequencies that follow from them.

The frequencies are computed here and set in Megatron's model, because Megatron-core 0.16.1 hard-codes three of the
four numbers of Llama 3's scaling. Formulas: Su et al., arXiv 2104.09864 (plain); Chen et al., arXiv 2306.15595
(linear); Grattafiori et al., arXiv 2407.21783, section 3.2, and the Llama 3.1 model card (by parts).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oreal_megatron.config import ConfigError

# Fields that each kind reads, beside rope_theta. YaRN and longrope also rescale attention, which is not supported.
FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of a model. Dynamic scaling begins beyond `max_positions`; within them it is plain."""

    theta: float = 10000.0
    kind: str = "default"  # a key of FIELDS
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0

    def frequencies(self, head_dim: int) -> Tensor:
        """Return the radians per position of each pair of dimensions, [head_dim / 2] float32."""
        plain = 1.0 / self.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        if self.kind == "linear":
            return plain / self.factor
        return self._by_parts(plain) if self.kind == "llama3" else plain

    def _by_parts(self, plain: Tensor) -> Tensor:
        """Leave short waves, stretch long ones by `factor`, blend those between (Llama 3.1)."""
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)  # over the original context
        low, high = self.low_freq_factor, self.high_freq_factor
        unscaled = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - unscaled) * plain / self.factor + unscaled * plain


def read(hf: Mapping[str, Any]) -> Rope:
    """Read the rotary embedding of a config.json, in transformers' current form (rope_parameters) or the older one."""
    fields = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    old_kind = fields.pop("type", "default")
    kind = fields.pop("rope_type", old_kind)
    theta = float(fields.pop("rope_theta", hf.get("rope_theta") or 10000.0))
    if kind not in FIELDS:
        raise ConfigError(f"rope type {kind!r} in config.json is not supported; supported are {', '.join(FIELDS)}")
    if missing := [name for name in FIELDS[kind] if name not in fields]:
        raise ConfigError(f"rope type {kind!r} in config.json lacks {', '.join(missing)}")
    values = {name: fields.pop(name) for name in FIELDS[kind]}
    if fields.get("partial_rotary_factor", 1.0) == 1.0:
        fields.pop("partial_rotary_factor", None)
    if unknown := [name for name, value in fields.items() if value is not None]:
        raise ConfigError(f"rope type {kind!r} in config.json has {', '.join(unknown)}, which is not supported")
    return Rope(theta, kind, **values)
