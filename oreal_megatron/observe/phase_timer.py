"""Timer of the phases of a step on this rank, and the metrics of speed that follow from it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch

from oreal_megatron.config import Config
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.observe import speed
from oreal_megatron.observe.speed import ReplicaWork
from oreal_megatron.protocols import Metrics
from oreal_megatron.records import Batch, Rollout
from oreal_megatron.runtime import distributed, heartbeat

# Phases in which a rank works alone and then waits for the others. Nothing beats during the wait.
INDEPENDENT_PHASES = ("generate", "verify")


class PhaseTimer:
    """Seconds of each phase of the current step. `peak_flops`: operations per second of one GPU, if known."""

    def __init__(self, config: Config, arch: Architecture | None = None, peak_flops: float | None = None):
        self.config, self.arch, self.peak_flops = config, arch, peak_flops
        self.start()

    def start(self) -> None:
        """Begin a step: reset all times."""
        self.started_at = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.own_seconds: dict[str, float] = {}  # of a phase, until this rank had finished its own part
        self.work: ReplicaWork | None = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds until the results of a phase are available."""
        started_at = time.monotonic()
        with heartbeat.phase(name):
            yield
            if torch.cuda.is_available():  # this stream only: copies of offloaded models may continue
                torch.cuda.current_stream().synchronize()
            if name in INDEPENDENT_PHASES:
                own = heartbeat.progress.beat_at - started_at
                self.own_seconds[name] = self.own_seconds.get(name, 0.0) + own
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started_at

    def count_work(self, batch: Batch) -> None:
        """Record what this rank's replica trains on; call it on one rank of each replica."""
        self.work = speed.replica_work(batch, self.arch)

    def finish_step(self, metrics: Metrics, rollouts: Sequence[Sequence[Rollout]]) -> Metrics:
        """Return the metrics of speed of the step that ends now, and begin the next one. Collective."""
        own_seconds, rank_works = zip(*distributed.all_gather_object((self.own_seconds, self.work)), strict=True)
        elapsed = time.monotonic() - self.started_at
        seconds = self.seconds | {"step": elapsed - self.seconds.get("evaluate", 0.0)}
        self.start()
        works = [work for work in rank_works if work]
        models = speed.computed_models(self.config, metrics, seconds) if works else []
        rollout_tokens = sum(
            len(rollout.prompt.tokens) + len(rollout.tokens)
            for prompt_rollouts in rollouts
            for rollout in prompt_rollouts
        )
        trained_tokens = sum(work.tokens for work in works)
        tokens = dict.fromkeys(models, trained_tokens)
        if rollouts:  # a supervised step has none
            tokens |= {"generate": rollout_tokens, "step": rollout_tokens}
        operations = {name: speed.operations(name, works, self.config) for name in models} if self.arch else {}
        result = {f"seconds/{name}": value for name, value in seconds.items()}
        result |= speed.rates(seconds, tokens, operations, distributed.world_size(), self.peak_flops)
        result |= speed.shares_of_step(seconds)
        result |= speed.idle_shares(seconds, own_seconds, [work.forward.get("lm", 0.0) for work in works])
        if models:
            fills = speed.pipeline_fills(models, works[0].mini_batches, self.config)
            result["speed/bubble"] = self.config.parallel.bubble(works[0].micro_batches, fills)
        if metrics.get("weight_sync/received_bytes") and seconds.get("weight_sync"):
            received = metrics["weight_sync/received_bytes"]
            result["weight_sync/gigabytes_per_second"] = received / seconds["weight_sync"] / 1e9
        return result
