"""Bytes on each rank in each phase by component, and the largest KV cache that fits beside them.

Parameters, gradients and optimizer follow Megatron's DistributedOptimizer as docs/evidence/scale.md measures
them: in bf16 2 + 4 bytes a parameter and 12 over the ranks that share it, in fp32 4 + 4 and 8.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from dataclasses import dataclass

from oreal_megatron.models.architecture import Architecture
from oreal_megatron.plan import activations
from oreal_megatron.plan.activations import ITEMSIZE
from oreal_megatron.plan.scenario import Scenario

COMPONENTS = (
    "parameters", "gradients", "optimizer", "activations", "head", "engine weights", "KV cache", "buffers", "reserve"
)  # fmt: skip
GATHER_BUCKET = 256 * 2**20  # reshard/gather_transport.py
Bytes = Counter[str]  # bytes by component; floats, for which Counter has no type


@dataclass(frozen=True)
class Stage:
    """Memory of each rank of one pipeline stage, by phase."""

    number: int
    phases: dict[str, Bytes]

    @property
    def fullest(self) -> str:
        """Phase that needs most memory."""
        return max(self.phases, key=lambda phase: self.phases[phase].total())

    @property
    def peak(self) -> float:
        """Bytes in that phase."""
        return self.phases[self.fullest].total()


def model_bytes(scenario: Scenario, stage: int, head: str) -> Bytes:
    """Return parameters, gradients, and this rank's share of main weights and moments of a trained model."""
    return _trained_bytes(scenario, scenario.elements(stage, head))


def _trained_bytes(scenario: Scenario, elements: int) -> Bytes:
    dtype = scenario.config.model.dtype
    states = 12 if dtype == "bfloat16" else 8
    sharing = scenario.data * scenario.config.parallel.context
    return Bytes(
        {"parameters": elements * ITEMSIZE[dtype], "gradients": 4 * elements, "optimizer": states * elements / sharing}
    )


def reference_bytes(scenario: Scenario, stage: int) -> float:
    """Return the parameters of the reference, and the float32 average of one that moves (mcore/moving_reference.py)."""
    itemsize = ITEMSIZE[scenario.config.model.dtype] + (4 if scenario.config.wide_reference else 0)
    return itemsize * scenario.elements(stage, "lm")


def stages(scenario: Scenario) -> list[Stage]:
    """Return the memory of all pipeline stages."""
    return [Stage(stage, _phases(scenario, stage)) for stage in range(scenario.config.parallel.pipeline)]


def largest_cache(scenario: Scenario, planned: list[Stage]) -> float:
    """Return the KV cache that fits on every rank, in every phase that has one."""
    return min(
        scenario.usable - memory.total() + memory["KV cache"]
        for stage in planned
        for memory in stage.phases.values()
        if memory["KV cache"]
    )


def _phases(scenario: Scenario, stage: int) -> dict[str, Bytes]:
    config, scoring = scenario.config, _scoring(scenario, stage)
    engine = Bytes({"engine weights": scenario.engine_weights(), "buffers": scenario.assumed.engine_gib * 2**30})
    awake = engine + Bytes({"KV cache": config.engine.kv_cache_gib * 2**30})
    resident = Bytes({"buffers": scenario.assumed.asleep_gib * 2**30})  # vLLM's sleep frees weights and cache only
    asleep, waking = (resident, engine) if config.engine.sleep else (awake, awake)
    models = {name: model_bytes(scenario, stage, head) for name, head in scenario.roles.items()}
    weights = Bytes({"parameters": models["policy"]["parameters"]})
    models["reference"] = Bytes({"parameters": reference_bytes(scenario, stage)})
    everything, largest = sum(models.values(), Bytes()), max(models.values(), key=Bytes.total)

    def phase(engine: Bytes, model: Bytes, temporary: Bytes) -> Bytes:
        """Add the engine, the active model (without offload: all models) and temporary memory."""
        return _with_reserve(scenario, engine + (model if config.offload else everything), temporary)

    # Parameters exist twice while Megatron copies them into its buffers, before it makes the optimizer.
    twice = Bytes({"buffers": max(largest["parameters"] - largest["optimizer"], 0.0)})
    phases = {"build": phase(asleep, largest, twice)}
    phases |= {"generate": phase(awake, Bytes(), Bytes()), "parity": phase(awake, weights, scoring)}
    for name in ("reward_model", "reference", "policy"):
        if name in models:
            temporary = scoring if name == "reference" else _training(scenario, stage, scenario.roles[name])
            phases[name] = phase(asleep, models[name], temporary)
    if config.reference.moves:  # just before it scores, the policy's weights are read
        phases["reference"] |= phase(asleep, models["reference"] + weights, Bytes())
    if scenario.teacher:
        phases |= _distillation(scenario, stage, scenario.teacher, asleep)
    phases["weight_sync"] = phase(waking, weights, _transfer(scenario))
    # The engine sleeps while a checkpoint is copied to the host.
    phases["save"] = phase(asleep, largest - Bytes({"gradients": largest["gradients"]}), Bytes())
    return phases


def _distillation(scenario: Scenario, stage: int, arch: Architecture, asleep: Bytes) -> dict[str, Bytes]:
    """Return the phases of `oreal distill`: the teacher reads a step's features, then the student is trained."""
    config, distilled = scenario.config, scenario.config.distillation
    teacher, itemsize = dataclasses.replace(scenario, arch=arch, teacher=None), ITEMSIZE[config.model.dtype]
    parameters = Bytes({"parameters": teacher.elements(stage, "lm") * itemsize})
    student = model_bytes(scenario, stage, "lm") + _projections(scenario, arch)
    tokens = config.supervised.samples_per_step * scenario.sequence_tokens / scenario.data / config.parallel.context
    width = arch.vocab / config.parallel.tensor if distilled.on_logits else distilled.layers * arch.hidden
    features = Bytes({"activations": tokens * width * itemsize})
    standing = [parameters, student] if config.offload else [parameters + student] * 2
    return {
        "teacher": _with_reserve(scenario, asleep + standing[0] + features, _scoring(teacher, stage)),
        "distillation": _with_reserve(scenario, asleep + standing[1] + features, _training(scenario, stage, "lm")),
    }


def _projections(scenario: Scenario, teacher: Architecture) -> Bytes:
    """Return the bytes of the learned maps to the teacher's width, which every tensor-parallel rank holds."""
    section = scenario.config.distillation
    return _trained_bytes(scenario, section.projection * section.layers * scenario.arch.hidden * teacher.hidden)


def _last(scenario: Scenario, stage: int) -> bool:
    return stage == scenario.config.parallel.pipeline - 1


def _training(scenario: Scenario, stage: int, head: str) -> Bytes:
    """Return what an update needs: the activations; after they are freed, torch's fused AdamW needs nothing more."""
    saved = activations.saved_bytes(scenario.arch, scenario.config, stage, scenario.longest, scenario.micro_batches)
    memory = Bytes(
        {"activations": saved + activations.temporary_bytes(scenario.arch, scenario.config, scenario.longest)}
    )
    if head == "lm" and _last(scenario, stage):
        memory["head"] = activations.head_bytes(scenario.arch, scenario.config, scenario.longest)  # type: ignore[assignment]  # floats, see Bytes
    return memory


def _scoring(scenario: Scenario, stage: int) -> Bytes:
    """Return what a forward pass without a backward needs: one layer and logits."""
    memory = Bytes({"activations": activations.temporary_bytes(scenario.arch, scenario.config, scenario.longest)})
    if _last(scenario, stage):
        memory["head"] = activations.head_bytes(scenario.arch, scenario.config, scenario.longest)  # type: ignore[assignment]  # floats, see Bytes
    return memory


def _transfer(scenario: Scenario) -> Bytes:
    direct = scenario.config.engine.transport == "direct" and not scenario.arch.experts
    return Bytes({"buffers": scenario.config.engine.buffer_mib * 2**20 if direct else 2 * GATHER_BUCKET})


def _with_reserve(scenario: Scenario, standing: Bytes, temporary: Bytes) -> Bytes:
    assumed = scenario.assumed
    communicators = assumed.context_gib + assumed.communicator_gib * group_count(scenario)
    total = standing + temporary
    total["reserve"] += communicators * 2**30 + assumed.fragments * temporary.total()  # type: ignore[assignment]  # floats, see Bytes
    return total


def group_count(scenario: Scenario) -> int:
    """Return the number of process groups of a rank: world, each parallel dimension, gradients, engine."""
    layout = scenario.config.parallel
    sizes = (
        scenario.world,
        layout.tensor,
        layout.pipeline,
        layout.context,
        scenario.data,
        scenario.model_ranks,
        scenario.config.engine.tensor,
    )
    return sum(size > 1 for size in sizes)


def host_bytes(scenario: Scenario) -> dict[str, float]:
    """Return the host RAM a node needs for offloaded models, and while a checkpoint is gathered or loaded."""
    layout = scenario.config.parallel
    stride = layout.tensor * layout.context * scenario.data
    offloaded = gathering = loading = 0.0
    for first in range(0, scenario.world, scenario.node):
        ranks = range(first, min(first + scenario.node, scenario.world))
        copies = [_offloaded(scenario, rank // stride) for rank in ranks]
        # Ranks with data- and context-parallel rank 0 gather; all ranks work on the same model at a time.
        peaks = [_gathering(scenario, rank // stride) for rank in ranks if rank % stride < layout.tensor]
        offloaded, gathering = max(offloaded, sum(copies)), max(gathering, *map(sum, zip(*peaks, strict=True)), 0.0)
        loading = max(loading, sum(max(_state_bytes(scenario, rank // stride)) for rank in ranks))
    idle = offloaded if scenario.config.offload else 0.0
    return {"idle models": idle, "gathering a checkpoint": gathering, "loading a checkpoint": loading}


def host_peak(host: dict[str, float]) -> float:
    """Return the largest sum of the uses in `host_bytes` that come together."""
    return host["idle models"] + max(host["gathering a checkpoint"], host["loading a checkpoint"])


def _state_bytes(scenario: Scenario, stage: int) -> list[float]:
    """Return main weights and moments of a stage's shard, of each trained model.

    Loading, Megatron allocates them on every data-parallel rank, not only the rank's own share.
    """
    return [12.0 * scenario.elements(stage, head) for name, head in scenario.roles.items() if name != "reference"]


def _gathering(scenario: Scenario, stage: int) -> list[float]:
    """Return the peak of a first data-parallel rank while each trained model in turn is gathered.

    It gets weights, main weights and moments of its shard, which is gathered on the device; those of earlier models
    remain until they are written.
    """
    elements = [scenario.elements(stage, head) for name, head in scenario.roles.items() if name != "reference"]
    return list(itertools.accumulate((12 + ITEMSIZE[scenario.config.model.dtype]) * count for count in elements))


def _offloaded(scenario: Scenario, stage: int) -> float:
    """Return the copies of a rank on the host; gradients are not copied."""
    parts = [model_bytes(scenario, stage, head) for name, head in scenario.roles.items() if name != "reference"]
    return sum(part["parameters"] + part["optimizer"] for part in parts) + reference_bytes(scenario, stage)
