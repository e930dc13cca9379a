"""Sampling order: difficulty-balanced prompts or shuffled demonstrations, a pure function of the step."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Generic, TypeVar

from oreal_megatron.config import ConfigError, DataConfig
from oreal_megatron.records import Prompt
from oreal_megatron.runtime import distributed

log = logging.getLogger(__name__)
Item = TypeVar("Item")


class Sampler(Generic[Item]):
    """Sampler that shuffles the items in every epoch and takes consecutive ones.

    The position is step x per_step and the order depends on seed and epoch only, so that nothing must be saved.
    """

    def __init__(self, items: Sequence[Item], per_step: int, seed: int):
        self.items, self.per_step = list(items), per_step
        self._order = lru_cache(2)(lambda epoch: _shuffled(len(self.items), f"{seed} {epoch}"))

    def take(self, step: int) -> list[Item]:
        """Return the items of a step, counted from 0."""
        positions = (divmod(step * self.per_step + i, len(self.items)) for i in range(self.per_step))
        return [self.items[self._order(epoch)[position]] for epoch, position in positions]


def balanced(prompts: Sequence[Prompt], config: DataConfig, seed: int) -> Sampler[Prompt]:
    """Return a sampler of prompts repeated by their pass-rate bucket (as in arXiv 2502.06781).

    A prompt whose pass rate lies in no bucket is left out (the paper keeps 0 to 0.8); one without appears once.
    """
    repeated = [prompt for prompt in prompts for _ in range(repeats(prompt.pass_rate, config.buckets))]
    if not repeated:
        raise ConfigError(
            f"none of the {len(prompts)} prompts of {config.path} has a pass rate inside data.buckets; "
            "widen the buckets or compute the pass rates again"
        )
    different = len({prompt.id for prompt in repeated})
    if different < config.prompts_per_step and distributed.rank() == 0:
        log.warning(
            "data.prompts_per_step is %d, but %s has %d problems: every step uses some of them more than once",
            config.prompts_per_step, config.path, different,
        )  # fmt: skip
    return Sampler(repeated, config.prompts_per_step, seed)


def repeats(pass_rate: float | None, buckets: Sequence[tuple[float, float, int]]) -> int:
    """Return how often a prompt appears in an epoch; buckets are (low, high, repeats) with low <= rate < high."""
    if pass_rate is None:
        return 1
    return sum(times for low, high, times in buckets if low <= pass_rate < high)


def _shuffled(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
