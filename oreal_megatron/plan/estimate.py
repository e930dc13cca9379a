"""The whole plan of a case, what is wrong with it, and the same as plain values for machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from oreal_megatron.plan import memory, timing
from oreal_megatron.plan.scenario import Scenario

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    case: Scenario
    stages: list[memory.Stage]
    largest_cache: float  # bytes
    host: dict[str, float]  # bytes on a machine
    transfer: timing.Transfer
    generation: timing.Generation
    seconds: dict[str, float]  # by phase
    checkpoint: tuple[float, float]  # bytes, seconds

    @property
    def fullest(self) -> memory.Stage:
        return max(self.stages, key=lambda stage: stage.most)

    @property
    def spare(self) -> float:
        """Bytes left on the fullest rank in its fullest phase; negative when it does not fit."""
        return self.case.usable - self.fullest.most

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def hours(self) -> float:
        """Of the whole run with its checkpoints; evaluations are not counted."""
        steps, every = self.case.config.steps, self.case.config.checkpoint.every
        return (steps * self.step_seconds + (steps // every if every else 1) * self.checkpoint[1]) / 3600

    @property
    def tokens_per_gpu_second(self) -> float:
        """Tokens of all answers with their prompts by the time of whole steps, as NeMo-RL counts."""
        config = self.case.config
        answers = config.data.prompts_per_step * config.sampling.rollouts_per_prompt
        return answers * self.case.sequence_tokens / self.step_seconds / self.case.world

    def as_dict(self) -> dict[str, Any]:
        return {
            "gpus": self.case.world,
            "gpus_per_node": self.case.node,
            "gpu": dataclasses.asdict(self.case.gpu),
            "assumptions": dataclasses.asdict(self.case.assumed),
            "fits": self.fits,
            "usable_bytes": self.case.usable,
            "spare_bytes": self.spare,
            "memory_bytes": {
                f"stage {stage.number}": {phase: dict(parts) for phase, parts in stage.phases.items()}
                for stage in self.stages
            },
            "host_bytes": self.host,
            "kv_cache": {
                "bytes": self.case.config.engine.kv_cache_gib * GIB,
                "largest_bytes": self.largest_cache,
                "bytes_per_token": self.case.cache_token(),
            },
            "generation": dataclasses.asdict(self.generation) | {"seconds": self.generation.seconds},
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "hours": self.hours,
            "tokens_per_gpu_second": self.tokens_per_gpu_second,
            "bubble": timing.bubble(self.case),
            "micro_batches": self.case.micro_batches,
            "transfer_bytes": {key: value for key, value in vars(self.transfer).items() if key != "transport"},
            "checkpoint": {"bytes": self.checkpoint[0], "seconds": self.checkpoint[1]},
            "warnings": list(warnings(self)),
        }


def make(case: Scenario, transfer: timing.Transfer | None = None) -> Estimate:
    """Estimate a case, or refuse it with a ConfigError; the transfer, the slow part, may be given."""
    case.check()
    stages = memory.stages(case)
    moved = transfer or timing.transfer(case)
    return Estimate(
        case,
        stages,
        memory.largest_cache(case, stages),
        memory.host(case),
        moved,
        timing.generation(case),
        timing.phases(case, moved),
        timing.checkpoint(case),
    )


def warnings(estimate: Estimate) -> Iterator[str]:
    """Sentences about what does not fit, hardly fits, or waits."""
    case = estimate.case
    for stage in estimate.stages:
        for phase, parts in stage.phases.items():
            left = case.usable - parts.total()
            if left < case.assumed.thin * case.usable:
                yield _tight(estimate, stage.number, phase, left)
    yield from _waiting(estimate)
    needed = sum(estimate.host.values()) / GIB
    if needed > case.assumed.host_gib:
        yield (
            f"a machine's own memory must hold {needed:.0f} GiB (idle models, and a checkpoint while it is gathered); "
            f"{case.assumed.host_gib:.0f} are assumed to be there"
        )


def _tight(estimate: Estimate, stage: int, phase: str, left: float) -> str:
    """One phase of one stage that is too full, with what would help."""
    parts = estimate.stages[stage].phases[phase]
    where = f"phase {phase} of stage {stage} " if len(estimate.stages) > 1 else f"phase {phase} "
    said = f"{where}needs {parts.total() / GIB:.1f} of {estimate.case.usable / GIB:.1f} GiB"
    said += f": {-left / GIB:.1f} too many" if left < 0 else f", {left / GIB:.1f} are left, which is thin"
    return f"{said}; {_remedy(estimate, parts)}"


def _remedy(estimate: Estimate, parts: memory.Bytes) -> str:
    config, case = estimate.case.config, estimate.case
    room = (estimate.largest_cache - case.assumed.thin * case.usable) / GIB
    if parts["KV cache"]:
        needed = case.cache_token() * config.engine.max_model_len / GIB
        if room > needed:
            return f"engine.kv_cache_gib={int(room)} would leave room"
        if not config.offload:
            return "offload=true takes idle models off the GPU"
        return "more pipeline stages or data-parallel ranks hold less of a model each"
    largest = max(("activations", "optimizer", "gradients", "parameters"), key=lambda name: parts[name])
    return {
        "activations": 'megatron.recompute_granularity="full", parallel.sequence=true or fewer '
        "tokens_per_micro_batch make activations smaller",
        "optimizer": "more data-parallel ranks share the optimizer",
    }.get(largest, "a larger parallel.tensor or parallel.pipeline holds less of a model on each rank")


def _waiting(estimate: Estimate) -> Iterator[str]:
    case, generation = estimate.case, estimate.generation
    cut, engine = case.config.parallel, case.config.engine
    for key, size in (("parallel.tensor", cut.tensor), ("engine.tensor", engine.tensor)):
        if case.crosses_nodes(size, 1):
            yield f"{key} is {size}, more than the {case.node} GPUs of a machine: its exchanges cross the network"
    if generation.concurrent < 0.8 * generation.answers:
        yield (
            f"{generation.concurrent:.0f} of a replica's {generation.answers:.0f} answers run at once; the others "
            "wait, or are computed again when the cache is full"
        )
    if (idle := timing.bubble(case)) > 0.25:
        yield (
            f"pipeline stages wait {idle:.0%} of an update: {case.micro_batches} micro-batches for {cut.pipeline} "
            "stages; fewer stages, or fewer tokens_per_micro_batch"
        )
