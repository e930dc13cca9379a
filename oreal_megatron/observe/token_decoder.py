"""Text of single tokens, from the tokenizer of a model folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache


def token_decoder(model_path: str) -> Callable[[int], str]:
    """Return a function from a token to its text; raise ConfigError where the tokenizer cannot be loaded."""
    from oreal_megatron.data import problems  # imports transformers, which takes seconds

    tokenizer = problems.load_tokenizer(model_path)
    return cache(lambda token: tokenizer.decode([token]))
