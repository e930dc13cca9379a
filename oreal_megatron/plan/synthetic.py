"""Synthetic samples of a step with lengths of a reasoning model, and the ranks that a rehearsal builds."""

from __future__ import annotations

import math
import random

from oreal_megatron.plan.scenario import Scenario
from oreal_megatron.records import Sample


def samples(scenario: Scenario) -> list[Sample]:
    """Return the samples of a step, correct and incorrect in turn, with log-normal lengths of the assumed mean.

    Each is of a prompt of its own. A mini-batch has no more than keep a pipeline busy: further micro-batches repeat the
    first ones. For interleaved pipelines every sample fills a micro-batch, so that all micro-batches have one shape.
    """
    parts = scenario.config.loss.mini_batches
    layout, budget, prompt = (
        scenario.config.parallel,
        scenario.config.tokens_per_micro_batch,
        int(scenario.assumed.prompt_tokens),
    )
    if layout.virtual > 1:
        lengths = [budget - prompt] * (scenario.data * layout.pipeline * parts)
    else:
        enough = scenario.data * max(2 * layout.pipeline, 4) * budget / scenario.sequence_tokens
        lengths = _draw_lengths(scenario, parts * max(round(min(scenario.sequences / parts, enough)), 2))
    signs = [1.0, -1.0] * len(lengths)
    pairs = zip(lengths, signs, strict=False)
    return [Sample((1,) * prompt, (2,) * n, sign, sign, rollout=(slot, 0)) for slot, (n, sign) in enumerate(pairs)]


def _draw_lengths(scenario: Scenario, count: int) -> list[int]:
    """Draw the lengths of responses."""
    spread = scenario.assumed.length_sigma
    generator, middle = random.Random(0), math.log(scenario.assumed.response_tokens) - spread**2 / 2
    longest = min(
        scenario.config.sampling.max_new_tokens,
        scenario.config.engine.max_model_len - int(scenario.assumed.prompt_tokens),
    )
    return [max(1, min(longest, round(generator.lognormvariate(middle, spread)))) for _ in range(count)]


def rank_at(scenario: Scenario, tensor: int, context: int, data: int, pipeline: int) -> int:
    """Return the rank at a position, in Megatron's order."""
    layout = scenario.config.parallel
    return tensor + layout.tensor * (context + layout.context * (data + scenario.data * pipeline))


def default_ranks(scenario: Scenario) -> list[int]:
    """Return the pipelines of the first and the last rank, and one neighbour of the first rank in every group."""
    layout = scenario.config.parallel
    ranks = set()
    for stage in range(layout.pipeline):
        ranks |= {
            rank_at(scenario, 0, 0, 0, stage),
            rank_at(scenario, layout.tensor - 1, layout.context - 1, scenario.data - 1, stage),
        }
    sizes = (layout.tensor, layout.context, scenario.data)
    for axis, size in enumerate(sizes):
        if size > 1:
            tensor, context, data = (int(other == axis) for other in range(3))
            ranks.add(rank_at(scenario, tensor, context, data, 0))
    return sorted(ranks)


def one_replica(scenario: Scenario) -> list[int]:
    """Return the ranks that hold one replica of the trainer."""
    layout = scenario.config.parallel
    return [
        rank_at(scenario, tensor, 0, 0, stage) for stage in range(layout.pipeline) for tensor in range(layout.tensor)
    ]
