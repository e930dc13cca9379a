"""Bytes on each rank in each phase, by component; and the largest key-value cache that they leave room for.

Parameters, gradients and optimizer are those of Megatron's DistributedOptimizer as docs/evidence/scale.md measures
them: in bf16 2 + 4 bytes a parameter and 12 over the ranks that share it, in fp32 4 + 4 and 8.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

from oreal_megatron.plan import activations
from oreal_megatron.plan.activations import ITEMSIZE
from oreal_megatron.plan.scenario import Scenario

COMPONENTS = (
    "parameters", "gradients", "optimizer", "activations", "head", "engine weights", "KV cache", "buffers", "reserve"
)  # fmt: skip
GATHER_BUCKET = 256 * 2**20  # reshard/gather_transport.py
Bytes = Counter  # by component


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: the memory of each of its ranks, by phase."""

    number: int
    phases: dict[str, Bytes]

    @property
    def fullest(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase].total())

    @property
    def most(self) -> float:
        return self.phases[self.fullest].total()


def held(case: Scenario, stage: int, head: str) -> Bytes:
    """A trained model: parameters, gradients, and its share of main weights and moments."""
    elements, dtype = case.elements(stage, head), case.config.model.dtype
    states = 12 if dtype == "bfloat16" else 8
    sharing = case.data * case.config.parallel.context
    return Bytes(
        {"parameters": elements * ITEMSIZE[dtype], "gradients": 4 * elements, "optimizer": states * elements / sharing}
    )


def stages(case: Scenario) -> list[Stage]:
    return [Stage(stage, _phases(case, stage)) for stage in range(case.config.parallel.pipeline)]


def largest_cache(case: Scenario, planned: list[Stage]) -> float:
    """Bytes of key-value cache that fit on every rank, in every phase that has one."""
    return min(
        case.usable - memory.total() + memory["KV cache"]
        for stage in planned
        for memory in stage.phases.values()
        if memory["KV cache"]
    )


def _phases(case: Scenario, stage: int) -> dict[str, Bytes]:
    config, scoring = case.config, _scoring(case, stage)
    engine = Bytes({"engine weights": case.engine_weights(), "buffers": case.assumed.engine_gib * 2**30})
    awake = engine + Bytes({"KV cache": config.engine.kv_cache_gib * 2**30})
    resident = Bytes({"buffers": case.assumed.asleep_gib * 2**30})  # vLLM's sleep frees weights and cache only
    asleep, waking = (resident, engine) if config.engine.sleep else (awake, awake)
    models = {name: held(case, stage, head) for name, head in case.roles.items()}
    weights = Bytes({"parameters": models["policy"]["parameters"]})
    models["reference"] = weights  # is only read
    everything, largest = sum(models.values(), Bytes()), max(models.values(), key=Bytes.total)

    def phase(engine: Bytes, model: Bytes, passing: Bytes) -> Bytes:
        """The engine, the model at work or all of them, and what is there for a moment."""
        return _with_reserve(case, engine + (model if config.offload else everything), passing)

    # Parameters are there twice while Megatron copies them into its buffers, before it makes the optimizer.
    twice = Bytes({"buffers": max(largest["parameters"] - largest["optimizer"], 0.0)})
    phases = {"build": phase(asleep, largest, twice)}
    phases |= {"generate": phase(awake, Bytes(), Bytes()), "parity": phase(awake, weights, scoring)}
    for name in ("reward_model", "reference", "policy"):
        if name in models:
            passing = scoring if name == "reference" else _training(case, stage, case.roles[name], models[name])
            phases[name] = phase(asleep, models[name], passing)
    phases["weight_sync"] = phase(waking, weights, _transfer(case))
    phases["save"] = phase(awake, largest - Bytes({"gradients": largest["gradients"]}), Bytes())
    return phases


def _last(case: Scenario, stage: int) -> bool:
    return stage == case.config.parallel.pipeline - 1


def _training(case: Scenario, stage: int, head: str, model: Bytes) -> Bytes:
    """Of an update: activations at their most, or what AdamW needs when they are gone."""
    kept = activations.kept(case.arch, case.config, stage, case.longest, case.micro_batches)
    memory = Bytes({"activations": kept + activations.working(case.arch, case.config, case.longest)})
    if head == "lm" and _last(case, stage):
        memory["head"] = activations.head(case.arch, case.config, case.longest)
    square_roots = model["optimizer"] / 3  # torch's AdamW makes one more tensor of each state's size
    return memory if memory.total() > square_roots else Bytes({"buffers": square_roots})


def _scoring(case: Scenario, stage: int) -> Bytes:
    """Of a forward pass without a backward: one layer's work and logits."""
    memory = Bytes({"activations": activations.working(case.arch, case.config, case.longest)})
    if _last(case, stage):
        memory["head"] = activations.head(case.arch, case.config, case.longest)
    return memory


def _transfer(case: Scenario) -> Bytes:
    direct = case.config.engine.transport == "direct" and not case.arch.experts
    return Bytes({"buffers": case.config.engine.buffer_mib * 2**20 if direct else 2 * GATHER_BUCKET})


def _with_reserve(case: Scenario, standing: Bytes, passing: Bytes) -> Bytes:
    assumed = case.assumed
    communicators = assumed.context_gib + assumed.communicator_gib * groups(case)
    total = standing + passing
    total["reserve"] += communicators * 2**30 + assumed.fragments * passing.total()
    return total


def groups(case: Scenario) -> int:
    """Process groups that a rank uses: the world, each way of cutting, gradients over data and context, the engine."""
    cut = case.config.parallel
    sizes = (case.world, cut.tensor, cut.pipeline, cut.context, case.data, case.model_ranks, case.config.engine.tensor)
    return sum(size > 1 for size in sizes)


def host(case: Scenario) -> dict[str, float]:
    """Bytes of the host's memory that a node must have: for idle models, and while a checkpoint is gathered."""
    cut = case.config.parallel
    stride = cut.tensor * cut.context * case.data
    offloaded = gathering = 0.0
    for first in range(0, case.world, case.node):
        ranks = range(first, min(first + case.node, case.world))
        away = [_offloaded(case, rank // stride) for rank in ranks]
        # Those whose data- and context-parallel rank is 0 gather; each model at the same time on all ranks.
        models = zip(*(_gathering(case, rank // stride, rank % stride < cut.tensor) for rank in ranks), strict=True)
        offloaded, gathering = max(offloaded, sum(away)), max(gathering, *map(sum, models))
    return {"idle models": offloaded if case.config.offload else 0.0, "gathering a checkpoint": gathering}


def _gathering(case: Scenario, stage: int, first: bool) -> list[float]:
    """Of a rank at most, while each trained model in turn is gathered.

    Megatron puts main weights and moments of its own shard in order, 12 bytes an element over all ranks. The first rank
    gathers one kind after the other, 12 bytes, and holds up to 12 more: that kind in parts and put together, twice; or
    then its copy of all. Of models before it are left the copies, and the weights.
    """
    elements = [case.elements(stage, head) for name, head in case.roles.items() if name != "reference"]
    shards = [12 * count / (case.data * case.config.parallel.context) for count in elements]
    if not first:
        return shards
    pending = itertools.accumulate(((12 + ITEMSIZE[case.config.model.dtype]) * count for count in elements), initial=0)
    return [before + 24 * count + shard for before, count, shard in zip(pending, elements, shards, strict=False)]


def _offloaded(case: Scenario, stage: int) -> float:
    """Copies that a rank keeps on the host; gradients are not copied."""
    parts = [held(case, stage, head) for name, head in case.roles.items() if name != "reference"]
    reference = held(case, stage, "lm")["parameters"]
    return sum(part["parameters"] + part["optimizer"] for part in parts) + reference
