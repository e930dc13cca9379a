"""Search for layouts that fit, best first: every even split of the model, with the largest KV cache that fits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from oreal_megatron.config import ConfigError, ParallelConfig
from oreal_megatron.plan import estimate, memory, timing
from oreal_megatron.plan.estimate import GIB, Estimate
from oreal_megatron.plan.scenario import Scenario

SIZES = (1, 2, 4, 8)
RECOMPUTE: dict[str, dict[str, str | int]] = {
    "nothing": {},
    "everything": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
NO_TRANSFER = timing.Transfer(0.0, 0.0, 0.0, "direct")


def best_layouts(scenario: Scenario, count: int = 5) -> list[Estimate]:
    """Return the best layouts that fit the GPUs with a margin, in the order of `rank`; [] if none does.

    Weight syncs take seconds to plan and a share of a step, so they are planned for twice as many layouts as returned.
    """
    shortlist = sorted(_fitting(scenario), key=rank)[: 2 * count]
    traffic: dict[tuple[ParallelConfig, int], timing.Transfer] = {}
    layouts = []
    for layout in shortlist:
        key = layout.scenario.config.parallel, layout.scenario.config.engine.tensor
        if key not in traffic:
            traffic[key] = timing.transfer(layout.scenario)
        layouts.append(estimate.estimate_scenario(layout.scenario, traffic[key]))
    return sorted(layouts, key=rank)[:count]


def rank(layout: Estimate) -> tuple[bool, float, int, int, int, int]:
    """Return the sort key of a layout: host memory that fits first, then seconds as printed, then the least split."""
    return not layout.fits_host, printed_seconds(layout), *_split(layout.scenario)


def printed_seconds(layout: Estimate) -> float:
    """Return the seconds of a step as they are printed, to three digits: smaller differences mean nothing."""
    return float(f"{layout.step_seconds:.3g}")


def overrides(layout: Estimate, recipe: Scenario) -> list[str]:
    """Return the `--set` assignments that change a recipe's layout to this one."""
    assignments = []
    for section in ("parallel", "engine"):
        before, after = getattr(recipe.config, section), getattr(layout.scenario.config, section)
        for field in dataclasses.fields(after):
            if getattr(before, field.name) != getattr(after, field.name):
                assignments.append(f"{section}.{field.name}={_format(getattr(after, field.name))}")
    if recipe.config.offload != layout.scenario.config.offload:
        assignments.append(f"offload={_format(layout.scenario.config.offload)}")
    before, after = recipe.config.megatron, layout.scenario.config.megatron
    changed = [key for key in before | after if before.get(key) != after.get(key)]
    return assignments + [f"megatron.{key}={_format(after.get(key))}" for key in changed]


def as_dict(layout: Estimate, recipe: Scenario) -> dict[str, Any]:
    """Return a layout, the reason for it and its assignments as JSON values."""
    return {"set": overrides(layout, recipe), "why": reason(layout)} | layout.as_dict()


def _format(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def reason(layout: Estimate) -> str:
    """Return what decides about a layout, as text."""
    training = sum(layout.seconds.get(name, 0.0) for name in ("reward_model", "reference", "policy"))
    left = min(
        layout.scenario.usable - parts.total()
        for stage in layout.stages
        for parts in stage.phases.values()
        if not parts["KV cache"]
    )
    return (
        f"generates in {layout.generation.seconds:.0f} s ({layout.generation.bound}), trains in {training:.0f} s "
        f"({timing.bubble(layout.scenario):.0%} bubble), {left / GIB:.0f} GiB left in training"
    )


def _split(scenario: Scenario) -> tuple[int, int, int, int]:
    layout = scenario.config.parallel
    return layout.context, layout.pipeline, layout.tensor, scenario.config.engine.tensor


def _fitting(scenario: Scenario) -> Iterator[Estimate]:
    options = (SIZES, SIZES, (1, 2, 4), SIZES, RECOMPUTE.values(), {True, scenario.config.offload})
    for tensor, pipeline, context, engine, recompute, offload in itertools.product(*options):
        if max(tensor, engine) > scenario.node or tensor * pipeline * context > scenario.world:
            continue
        candidate = _with_layout(scenario, tensor, pipeline, context, engine, recompute, offload)
        try:
            candidate.check_layout()
        except ConfigError:  # does not divide evenly: not a candidate
            continue
        if (filled := _with_largest_cache(candidate)) is not None:
            yield estimate.estimate_scenario(filled, NO_TRANSFER)


def _with_layout(
    scenario: Scenario,
    tensor: int,
    pipeline: int,
    context: int,
    engine: int,
    recompute: dict[str, str | int],
    offload: bool,
) -> Scenario:
    config = scenario.config
    parallel = dataclasses.replace(
        config.parallel, tensor=tensor, pipeline=pipeline, context=context, virtual=1, sequence=tensor > 1
    )
    rollouts = config.data.prompts_per_step * config.sampling.rollouts_per_prompt * engine / scenario.world
    replica_engine = dataclasses.replace(config.engine, tensor=engine, max_num_seqs=math.ceil(rollouts))
    megatron = {key: value for key, value in config.megatron.items() if not key.startswith("recompute_")}
    changed = dataclasses.replace(
        config, parallel=parallel, engine=replica_engine, megatron=megatron | recompute, offload=offload
    )
    return dataclasses.replace(scenario, config=changed)


def _with_largest_cache(scenario: Scenario) -> Scenario | None:
    """Return the scenario with the largest cache in GiB that leaves a margin; None if that is too small."""
    stages = memory.stages(scenario)
    margin = scenario.assumed.thin * scenario.usable
    cache = (memory.largest_cache(scenario, stages) - margin) // GIB
    training = max(parts.total() for stage in stages for parts in stage.phases.values() if not parts["KV cache"])
    if (
        cache * GIB < scenario.cache_token() * scenario.config.engine.max_model_len
        or training > scenario.usable - margin
    ):
        return None
    engine = dataclasses.replace(scenario.config.engine, kv_cache_gib=float(cache))
    return dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, engine=engine))
