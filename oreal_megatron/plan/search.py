"""Layouts that fit, best first: every cut of the model that divides it evenly, with the cache that fills the GPU."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from oreal_megatron.config import ConfigError
from oreal_megatron.plan import estimate, memory, timing
from oreal_megatron.plan.estimate import GIB, Estimate
from oreal_megatron.plan.scenario import Scenario

CUTS = (1, 2, 4, 8)
RECOMPUTE = {
    "nothing": {},
    "everything": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
EQUAL = 1.03
UNPLANNED = timing.Transfer(0.0, 0.0, 0.0, "direct")


def best(case: Scenario, count: int = 5) -> list[Estimate]:
    """The fastest layouts that fit with a margin, empty when none does. Those that are hardly slower than the fastest
    count as equal, and of equals the one that is cut least is better."""
    found = list(_fitting(case))
    fastest = min((one.step_seconds for one in found), default=0.0)
    found.sort(key=lambda one: (max(one.step_seconds, EQUAL * fastest), *_cut(one.case)))
    return [estimate.make(one.case) for one in found[:count]]


def reason(one: Estimate) -> str:
    """Why a layout is where it is."""
    training = sum(one.seconds.get(name, 0.0) for name in ("reward_model", "reference", "policy"))
    left = min(
        one.case.usable - parts.total()
        for stage in one.stages
        for parts in stage.phases.values()
        if not parts["KV cache"]
    )
    return (
        f"generates in {one.generation.seconds:.0f} s ({one.generation.bound}), trains in {training:.0f} s "
        f"({timing.bubble(one.case):.0%} bubble), {left / GIB:.0f} GiB left while it trains"
    )


def _cut(case: Scenario) -> tuple[int, int, int, int]:
    cut = case.config.parallel
    return cut.context, cut.pipeline, cut.tensor, case.config.engine.tensor


def _fitting(case: Scenario) -> Iterator[Estimate]:
    options = (CUTS, CUTS, (1, 2, 4), CUTS, RECOMPUTE.values(), {True, case.config.offload})
    for tensor, pipeline, context, engine, recompute, offload in itertools.product(*options):
        if max(tensor, engine) > case.node or tensor * pipeline * context > case.world:
            continue
        one = _case(case, tensor, pipeline, context, engine, recompute, offload)
        try:
            one.check_layout()
        except ConfigError:  # of what does not divide there is nothing to say
            continue
        if (filled := _filled(one)) is not None:
            yield estimate.make(filled, UNPLANNED)


def _case(
    case: Scenario, tensor: int, pipeline: int, context: int, engine: int, recompute: dict, offload: bool
) -> Scenario:
    config = case.config
    cut = dataclasses.replace(
        config.parallel, tensor=tensor, pipeline=pipeline, context=context, virtual=1, sequence=tensor > 1
    )
    answers = config.data.prompts_per_step * config.sampling.rollouts_per_prompt * engine / case.world
    served = dataclasses.replace(config.engine, tensor=engine, max_num_seqs=math.ceil(answers))
    kept = {key: value for key, value in config.megatron.items() if not key.startswith("recompute_")}
    changed = dataclasses.replace(config, parallel=cut, engine=served, megatron=kept | recompute, offload=offload)
    return dataclasses.replace(case, config=changed)


def _filled(case: Scenario) -> Scenario | None:
    """The same with the largest cache that leaves a margin, in whole GiB; None when that is too small."""
    stages = memory.stages(case)
    margin = case.assumed.thin * case.usable
    cache = (memory.largest_cache(case, stages) - margin) // GIB
    training = max(parts.total() for stage in stages for parts in stage.phases.values() if not parts["KV cache"])
    if cache * GIB < case.cache_token() * case.config.engine.max_model_len or training > case.usable - margin:
        return None
    engine = dataclasses.replace(case.config.engine, kv_cache_gib=float(cache))
    return dataclasses.replace(case, config=dataclasses.replace(case.config, engine=engine))
