"""Mistral, from 7B v0.2 on: Llama's layers; a sliding window shorter than the context is not supported."""

from __future__ import annotations

from oreal_megatron.config import ConfigError
from oreal_megatron.models import config_fields
from oreal_megatron.models.config_fields import ArchitectureFields, HFConfig

DEFAULT_WINDOW = 4096  # transformers' default where config.json has no sliding_window


def read(hf: HFConfig) -> ArchitectureFields:
    """Return the fields of Architecture from a Mistral config.json."""
    config_fields.check(hf, read=["sliding_window"])
    arch = config_fields.decoder(hf)
    check_window(hf.get("sliding_window", DEFAULT_WINDOW), arch["max_positions"])
    return arch


def check_window(window: int | None, positions: int) -> None:
    """Raise ConfigError for attention that covers less than the context."""
    if window is not None and window < positions:
        raise ConfigError(
            f"sliding_window is {window} and max_position_embeddings {positions}: sliding-window attention is not "
            "supported; lower max_position_embeddings to the window, or set sliding_window to null if it is off"
        )
