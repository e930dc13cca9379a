"""Checks of the fields of `config.megatron` against Megatron's TransformerConfig, which checks no types itself."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Container, Mapping
from typing import Any, Literal

from megatron.core.transformer import TransformerConfig

from oreal_megatron.config import ConfigError, schema
from oreal_megatron.config.suggestions import suggest


def check_fields(fields: Mapping[str, Any], derived: Container[str]) -> None:
    """Raise ConfigError for a field that does not exist, that is in `derived`, or that has a value of another type."""
    hints = typing.get_type_hints(TransformerConfig)
    known = [field.name for field in dataclasses.fields(TransformerConfig)]
    for name, value in fields.items():
        if name not in known:
            raise ConfigError(f"config.megatron: TransformerConfig has no field {name!r}{suggest(name, known)}")
        if name in derived:
            raise ConfigError(
                f"config.megatron: {name} is derived from the model and the other sections; set those instead"
            )
        if _is_plain(hints[name]) and (problem := schema.type_problem(f"megatron.{name}", value, hints[name])):
            raise ConfigError(problem)


def _is_plain(hint: Any) -> bool:
    """Return whether an annotation has only numbers, texts, true, false, None, choices of them, and lists of them."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is list or origin in schema.UNIONS:
        return all(map(_is_plain, args))
    return origin is Literal or hint in schema.TYPE_NAMES
