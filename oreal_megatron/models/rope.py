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


def read(hf: Mapping[str, Any], default_theta: float = 10000.0) -> Rope:
    """Read the rotary embedding of a config.json, in transformers' current form (rope_parameters) or the older one.

    Raises ConfigError where the two forms are there and disagree: readers differ in which of them they follow.
    """
    forms = {key: _form(key, hf[key]) for key in ("rope_parameters", "rope_scaling") if hf.get(key) not in (None, {})}
    kinds = {key: (kind, fields) for key, (kind, fields, _) in forms.items()}
    thetas = {f"{key}.rope_theta": theta for key, (_, _, theta) in forms.items() if theta is not None}
    if hf.get("rope_theta") is not None:
        thetas["rope_theta"] = hf["rope_theta"]
    for values in (kinds, thetas):
        if len(values) > 1 and any(value != next(iter(values.values())) for value in values.values()):
            listed = " and ".join(f"{key} = {_value_at(hf, key)!r}" for key in values)
            raise ConfigError(f"config.json has {listed}, which disagree; remove the wrong one")
    for key, theta in thetas.items():
        _require_positive(key, theta)
    kind, fields = next(iter(kinds.values()), ("default", {}))
    return Rope(float(next(iter(thetas.values()), default_theta)), kind, **_scaling(kind, dict(fields)))


def _form(key: str, value: Any) -> tuple[str, dict[str, Any], Any]:
    """Return kind, further fields and theta of one form; fields that are null count as absent."""
    if not isinstance(value, dict):
        raise ConfigError(f"config.json has {key} = {value!r}; expected an object or null")
    fields = {name: field for name, field in value.items() if field is not None}
    old_kind = fields.pop("type", None)
    kind = fields.pop("rope_type", old_kind or "default")
    if old_kind not in (None, kind):
        raise ConfigError(f"config.json has {key} with type {old_kind!r} and rope_type {kind!r}; remove the wrong one")
    theta = fields.pop("rope_theta", None)
    if fields.get("partial_rotary_factor") == 1.0:
        del fields["partial_rotary_factor"]
    return kind, fields, theta


def _scaling(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a kind of scaling; ConfigError for those that are missing, unknown or out of range."""
    if kind not in list(FIELDS):  # by equality: it may be any JSON value
        raise ConfigError(f"rope type {kind!r} in config.json is not supported; supported are {', '.join(FIELDS)}")
    if missing := [name for name in FIELDS[kind] if name not in fields]:
        raise ConfigError(f"rope type {kind!r} in config.json lacks {', '.join(missing)}")
    if unknown := [name for name in fields if name not in FIELDS[kind]]:
        raise ConfigError(f"rope type {kind!r} in config.json has {', '.join(unknown)}, which is not supported")
    for name, value in fields.items():
        _require_positive(f"{name} of rope type {kind!r}", value)
    if kind == "llama3" and fields["high_freq_factor"] <= fields["low_freq_factor"]:
        raise ConfigError("config.json has a high_freq_factor that is not above its low_freq_factor")
    return fields


def _require_positive(name: str, value: Any) -> None:
    """Raise ConfigError unless the value is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"config.json has {name} = {value!r}; expected a number above 0")


def _value_at(hf: Mapping[str, Any], path: str) -> Any:
    key, _, inner = path.partition(".")
    return hf[key][inner] if inner else hf[key]
