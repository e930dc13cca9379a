"""A step's samples with lengths like a reasoner's, and ranks with which a rehearsal compares every kind of group."""

from __future__ import annotations

import math
import random

from oreal_megatron.plan.scenario import Scenario
from oreal_megatron.records import Sample

SPREAD = 0.6  # of the logarithms of lengths


def samples(case: Scenario) -> list[Sample]:
    """As many as a step keeps, right and wrong in turn; log-normal lengths with the assumed mean. No more than make a
    pipeline busy: further micro-batches would repeat what the first ones say.

    For interleaved pipelines all are as long as a micro-batch, so that all micro-batches have one shape.
    """
    cut, budget, prompt = case.config.parallel, case.config.tokens_per_micro_batch, int(case.assumed.prompt_tokens)
    if cut.virtual > 1:
        lengths = [budget - prompt] * (case.data * cut.pipeline)
    else:
        enough = case.data * max(2 * cut.pipeline, 4) * budget / case.sequence_tokens
        lengths = _drawn(case, max(round(min(case.sequences, enough)), 2))
    signs = [1.0, -1.0] * len(lengths)
    return [Sample((1,) * prompt, (2,) * n, sign, sign) for n, sign in zip(lengths, signs, strict=False)]


def _drawn(case: Scenario, count: int) -> list[int]:
    """Lengths of responses."""
    generator, middle = random.Random(0), math.log(case.assumed.response_tokens) - SPREAD**2 / 2
    longest = min(
        case.config.sampling.max_new_tokens, case.config.engine.max_model_len - int(case.assumed.prompt_tokens)
    )
    return [max(1, min(longest, round(generator.lognormvariate(middle, SPREAD)))) for _ in range(count)]


def rank(case: Scenario, tensor: int, context: int, data: int, pipeline: int) -> int:
    """Megatron's order of ranks."""
    cut = case.config.parallel
    return tensor + cut.tensor * (context + cut.context * (data + case.data * pipeline))


def chosen(case: Scenario) -> list[int]:
    """The pipelines of the first and of the last rank, whole, and one neighbour of the first rank in every group."""
    cut = case.config.parallel
    found = set()
    for stage in range(cut.pipeline):
        found |= {rank(case, 0, 0, 0, stage), rank(case, cut.tensor - 1, cut.context - 1, case.data - 1, stage)}
    sizes = (cut.tensor, cut.context, case.data)
    for axis, size in enumerate(sizes):
        if size > 1:
            found.add(rank(case, *(int(other == axis) for other in range(3)), 0))
    return sorted(found)


def one_replica(case: Scenario) -> list[int]:
    """The ranks that hold one replica of the trainer."""
    cut = case.config.parallel
    return [rank(case, tensor, 0, 0, stage) for stage in range(cut.pipeline) for tensor in range(cut.tensor)]
