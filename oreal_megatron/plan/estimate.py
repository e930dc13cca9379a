"""Estimate of a scenario: memory, time and traffic, with warnings, as a record and as JSON values."""

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
    """Memory, time and traffic of one scenario."""

    scenario: Scenario
    stages: list[memory.Stage]
    largest_cache: float  # bytes
    host: dict[str, float]  # bytes on a node
    transfer: timing.Transfer
    generation: timing.Generation
    seconds: dict[str, float]  # by phase
    distillation: dict[str, float]  # seconds of a step of `oreal distill`, by pass; empty without a teacher
    checkpoint: tuple[float, float]  # bytes, seconds

    @property
    def fullest(self) -> memory.Stage:
        """Pipeline stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def spare(self) -> float:
        """Bytes left on the fullest rank in its fullest phase; negative when it does not fit."""
        return self.scenario.usable - self.fullest.peak

    @property
    def fits(self) -> bool:
        """True if every phase fits into the GPUs' memory."""
        return self.spare >= 0

    @property
    def host_gib(self) -> float:
        """GiB of host memory that a node needs at once."""
        return memory.host_peak(self.host) / GIB

    @property
    def fits_host(self) -> bool:
        """True if a node has the host memory, as far as assumed."""
        return self.host_gib <= self.scenario.assumed.host_gib

    @property
    def step_seconds(self) -> float:
        """Seconds of one step."""
        return sum(self.seconds.values())

    @property
    def hours(self) -> float:
        """Hours of the run with its checkpoints, without evaluations."""
        steps, every = self.scenario.config.steps, self.scenario.config.checkpoint.every
        return (steps * self.step_seconds + (steps // every if every else 1) * self.checkpoint[1]) / 3600

    @property
    def tokens_per_gpu_second(self) -> float:
        """Tokens of all rollouts with their prompts per second of the step and GPU, counted as in NeMo-RL."""
        config = self.scenario.config
        rollouts = config.data.prompts_per_step * config.sampling.rollouts_per_prompt
        return rollouts * self.scenario.sequence_tokens / self.step_seconds / self.scenario.world

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON values."""
        return {
            "gpus": self.scenario.world,
            "gpus_per_node": self.scenario.node,
            "gpu": dataclasses.asdict(self.scenario.gpu),
            "assumptions": dataclasses.asdict(self.scenario.assumed),
            "fits": self.fits,
            "usable_bytes": self.scenario.usable,
            "spare_bytes": self.spare,
            "memory_bytes": {
                f"stage {stage.number}": {phase: dict(parts) for phase, parts in stage.phases.items()}
                for stage in self.stages
            },
            "host_bytes": self.host,
            "kv_cache": {
                "bytes": self.scenario.config.engine.kv_cache_gib * GIB,
                "largest_bytes": self.largest_cache,
                "bytes_per_token": self.scenario.cache_token(),
            },
            "generation": dataclasses.asdict(self.generation) | {"seconds": self.generation.seconds},
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "distillation_seconds": self.distillation,
            "hours": self.hours,
            "tokens_per_gpu_second": self.tokens_per_gpu_second,
            "bubble": timing.bubble(self.scenario),
            "micro_batches": self.scenario.micro_batches,
            "transfer_bytes": {key: value for key, value in vars(self.transfer).items() if key != "transport"},
            "checkpoint": {"bytes": self.checkpoint[0], "seconds": self.checkpoint[1]},
            "warnings": list(warnings(self)),
        }


def estimate_recipe(scenario: Scenario) -> Estimate:
    """Estimate the scenario of a recipe; raise ConfigError for what a run, or Megatron in it, would refuse."""
    scenario.check()
    scenario.check_megatron()
    return estimate_scenario(scenario)


def estimate_scenario(scenario: Scenario, transfer: timing.Transfer | None = None) -> Estimate:
    """Estimate a scenario; raise ConfigError if it cannot run. `transfer`: the slow part, if known already."""
    scenario.check()
    stages = memory.stages(scenario)
    traffic = transfer or timing.transfer(scenario)
    return Estimate(
        scenario,
        stages,
        memory.largest_cache(scenario, stages),
        memory.host_bytes(scenario),
        traffic,
        timing.generation(scenario),
        timing.phases(scenario, traffic),
        timing.distillation(scenario),
        timing.checkpoint(scenario),
    )


def warnings(estimate: Estimate) -> Iterator[str]:
    """Yield messages about what does not fit, fits barely, or waits."""
    scenario = estimate.scenario
    for stage in estimate.stages:
        for phase, parts in stage.phases.items():
            left = scenario.usable - parts.total()
            if left < scenario.assumed.thin * scenario.usable:
                yield _tight(estimate, stage.number, phase, left)
    yield from _waiting(estimate)
    if not estimate.fits_host:
        idle = "idle models (offload=true) and " if scenario.config.offload else ""
        yield (
            f"does not fit the host: {idle}a checkpoint while it is gathered or loaded need {estimate.host_gib:.0f} "
            f"GiB of RAM per node, {scenario.assumed.host_gib:.0f} are assumed; set --assume host_gib=N to what a node "
            "has, or use more nodes"
        )


def _tight(estimate: Estimate, stage: int, phase: str, left: float) -> str:
    """Return a message about one phase of one stage without a margin, with a remedy."""
    parts = estimate.stages[stage].phases[phase]
    position = f"phase {phase} of stage {stage} " if len(estimate.stages) > 1 else f"phase {phase} "
    text = f"{position}needs {parts.total() / GIB:.1f} of {estimate.scenario.usable / GIB:.1f} GiB"
    text += f": {-left / GIB:.1f} GiB too much" if left < 0 else f", only {left / GIB:.1f} left"
    return f"{text}; {_remedy(estimate, parts)}"


def _remedy(estimate: Estimate, parts: memory.Bytes) -> str:
    config, scenario = estimate.scenario.config, estimate.scenario
    space = (estimate.largest_cache - scenario.assumed.thin * scenario.usable) / GIB
    if parts["KV cache"]:
        needed = scenario.cache_token() * config.engine.max_model_len / GIB
        if space > needed:
            return f"engine.kv_cache_gib={int(space)} would fit"
        if not config.offload:
            return "offload=true moves idle models to the host"
        return "with a larger parallel.pipeline or more --gpus, each rank holds less of a model"
    largest = max(("activations", "optimizer", "gradients", "parameters"), key=lambda name: parts[name])
    return {
        "activations": 'megatron.recompute_granularity="full", parallel.sequence=true or fewer '
        "tokens_per_micro_batch reduce activations",
        "optimizer": "with more --gpus, more data-parallel ranks share the optimizer",
    }.get(largest, "with a larger parallel.tensor or parallel.pipeline, each rank holds less of a model")


def _waiting(estimate: Estimate) -> Iterator[str]:
    scenario, generation = estimate.scenario, estimate.generation
    layout, engine = scenario.config.parallel, scenario.config.engine
    for key, size in (("parallel.tensor", layout.tensor), ("engine.tensor", engine.tensor)):
        if scenario.crosses_nodes(size, 1):
            yield f"{key} is {size}, more than {scenario.node} GPUs per node: its communication crosses the network"
    if generation.concurrent < 0.8 * generation.rollouts:
        yield (
            f"{generation.concurrent:.0f} of {generation.rollouts:.0f} rollouts per engine replica run at once "
            "(engine.max_num_seqs, engine.kv_cache_gib); the others wait, or are computed again when the cache is full"
        )
    if (idle := timing.bubble(scenario)) > 0.25:
        parts = scenario.config.loss.mini_batches
        split = f" in {parts} mini-batches" if parts > 1 else ""
        yield (
            f"pipeline stages wait {idle:.0%} of an update: {scenario.micro_batches} micro-batches{split} for "
            f"{layout.pipeline} stages; lower parallel.pipeline{', loss.mini_batches' * (parts > 1)} or "
            "tokens_per_micro_batch"
        )
