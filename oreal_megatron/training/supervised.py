"""Supervised fine-tuning: what `oreal sft` does before reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oreal_megatron.algo import guard, packing
from oreal_megatron.config import Config
from oreal_megatron.observe.progress import Bar
from oreal_megatron.records import PackingSpec
from oreal_megatron.runtime import heartbeat


def imitate(
    config: Config,
    demonstrations: Any,  # .take(step) -> samples
    policy: Any,  # .imitate(batch) -> metrics
    accuracy: Callable[[], float],  # greedy, held out, of the present weights
    log: Callable[[int, dict[str, float]], None],
    shown: bool,
    packing_spec: PackingSpec,
) -> int:
    """Train for `supervised.steps`, or until the held-out accuracy is reached; returns the steps done."""
    wanted = config.supervised
    with Bar("sft", wanted.steps, shown) as bar:
        for step in range(wanted.steps):
            heartbeat.step(step)
            batch = packing.batch(demonstrations.take(step), packing_spec)
            metrics = policy.imitate(batch)
            guard.check(metrics, config.guard, step)
            log(step, metrics)
            note = f"loss {metrics['loss/total']:.3f}"
            if wanted.evaluate_every and (step + 1) % wanted.evaluate_every == 0:
                reached = accuracy()
                note += f", held-out accuracy {reached:.3f}"
                if reached >= wanted.stop_at_accuracy:
                    bar.advance(1, note)
                    return step + 1
            bar.advance(1, note)
    return wanted.steps
