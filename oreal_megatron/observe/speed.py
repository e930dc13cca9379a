"""How fast the steps of a run are, measured while they run. docs/evidence/speed.md defines every term.

Tokens per second per GPU are NeMo-RL's (its docs/about/performance-summary.md, and `print_performance_metrics` in its
nemo_rl/algorithms/utils.py): tokens that a phase processes, those of prompts included, by the phase's seconds and the
number of GPUs; in total, all tokens of all answers with their prompts by the seconds of the step.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from oreal_megatron.algo import guard
from oreal_megatron.config import Config
from oreal_megatron.models import flops
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.records import Batch, MicroBatch, Rollout
from oreal_megatron.runtime import distributed, heartbeat

# Forward passes that a phase costs, a backward pass being two; what is computed again for it is not counted.
PASSES = {"reward_model": 3, "reference": 1, "policy": 3}
HEADS = {"reward_model": "scalar", "reference": "lm", "policy": "lm"}
WAITED_FOR = ("generate", "verify")  # phases in which a rank does its part alone, and then waits for the others
PARTS = {"generate": ("generate",), "verify": ("verify",), "training": tuple(PASSES), "sync": ("weight_sync",)}


@dataclass(frozen=True)
class Work:
    """What one data-parallel replica trains on in a step."""

    micro_batches: int
    tokens: int
    forward: dict[str, float]  # operations of a pass forward, by kind of head; empty where no model is known


class Meter:
    """Measures the phases of a step on this rank; `peak`: operations per second of a GPU, where they are known."""

    def __init__(self, config: Config, arch: Architecture | None = None, peak: float | None = None):
        self.config, self.arch, self.peak = config, arch, peak
        self.start()

    def start(self) -> None:
        """A step begins now."""
        self.began = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.alone: dict[str, float] = {}  # seconds until this rank had done its own part of a phase
        self.work: Work | None = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the seconds of a phase until its results are there."""
        began = time.monotonic()
        with heartbeat.phase(name):
            yield
            if torch.cuda.is_available():  # this stream alone: copies of idle models may go on
                torch.cuda.current_stream().synchronize()
            if name in WAITED_FOR:  # nothing beats while it waits
                self.alone[name] = self.alone.get(name, 0.0) + heartbeat.progress.beat_at - began
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def trains_on(self, batch: Batch) -> None:
        """What this rank's replica trains on; called on one rank of each replica."""
        self.work = work(batch, self.arch)

    def step(self, metrics: dict[str, float], rollouts: Sequence[Sequence[Rollout]]) -> dict[str, float]:
        """Metrics of the step that ends now, where the next one begins. Collective."""
        alone, shares = zip(*distributed.all_gather_object((self.alone, self.work)), strict=True)
        seconds = self.seconds | {"step": time.monotonic() - self.began - self.seconds.get("evaluate", 0.0)}
        self.start()
        shares = [share for share in shares if share]
        models = _computed(self.config, metrics, seconds) if shares else []
        answers = sum(len(one.prompt.tokens) + len(one.tokens) for row in rollouts for one in row)
        trained = sum(share.tokens for share in shares)
        tokens = {"generate": answers, **dict.fromkeys(models, trained), "step": answers}
        computed = {name: _operations(name, shares) for name in models} if self.arch else {}
        found = {f"seconds/{name}": value for name, value in seconds.items()}
        found |= rates(seconds, tokens, computed, distributed.world_size(), self.peak)
        found |= shares_of_step(seconds) | idle(seconds, alone, [share.forward.get("lm", 0.0) for share in shares])
        if shares:
            found["speed/bubble"] = self.config.parallel.bubble(shares[0].micro_batches)
        if metrics.get("weight_sync/received_bytes") and seconds.get("weight_sync"):
            found["weight_sync/gigabytes_per_second"] = (
                metrics["weight_sync/received_bytes"] / seconds["weight_sync"] / 1e9
            )
        return found


def work(batch: Batch, arch: Architecture | None) -> Work:
    """Filler is not counted, and the head at action tokens alone, which are all that it is computed for."""
    lengths = [length for part in batch.micro_batches for length in _lengths(part)]
    rows = sum(len(part.labels) for part in batch.micro_batches)
    forward = {head: flops.forward(arch, lengths, rows, head) for head in ("lm", "scalar")} if arch else {}
    return Work(len(batch.micro_batches), sum(lengths), forward)


def _lengths(part: MicroBatch) -> list[int]:
    """Tokens of each sequence, those that follow being filler."""
    sequences = int(part.reward.count_nonzero())
    return [stop - start for start, stop in pairwise(part.sequence_offsets)][:sequences]


def _computed(config: Config, metrics: dict[str, float], seconds: dict[str, float]) -> list[str]:
    """The models that computed something in this step: a policy whose reward model refused it does not."""
    idle = [] if config.reward_model.enabled else ["reward_model"]
    idle += ["policy"] if "reward_model" in guard.skipped_models(metrics) else []
    return [name for name in PASSES if name in seconds and name not in idle]


def _operations(model: str, shares: Sequence[Work]) -> float:
    return PASSES[model] * sum(share.forward[HEADS[model]] for share in shares)


def rates(
    seconds: dict[str, float], tokens: dict[str, int], computed: dict[str, float], gpus: int, peak: float | None
) -> dict[str, float]:
    """Tokens and operations of phases, per second and GPU; MFU is left out where the peak is not known."""
    found = {}
    for name, count in tokens.items():
        if seconds.get(name):
            found[f"speed/tokens_per_second_per_gpu/{name}"] = count / seconds[name] / gpus
    for name, count in computed.items():
        if seconds.get(name):
            rate = count / seconds[name] / gpus
            found[f"speed/tflops_per_second_per_gpu/{name}"] = rate / 1e12
            if peak:
                found[f"speed/mfu/{name}"] = rate / peak
    return found


def shares_of_step(seconds: dict[str, float]) -> dict[str, float]:
    """Where the step's time went; "other": the proof, checkpoints, packing, writing."""
    spent = {part: sum(seconds.get(name, 0.0) for name in names) for part, names in PARTS.items()}
    spent["other"] = seconds["step"] - sum(spent.values())
    return {f"speed/share/{part}": value / seconds["step"] for part, value in spent.items()}


def idle(seconds: dict[str, float], alone: Sequence[dict[str, float]], forward: Sequence[float]) -> dict[str, float]:
    """Share of its time that the mean rank waits for the slowest: measured where each works alone, and for training,
    whose ranks wait for each other all the time, by the operations that were dealt to the replicas."""
    found = {name: waiting([one.get(name, 0.0) for one in alone]) for name in WAITED_FOR}
    found["training"] = waiting(forward)
    found = {name: share for name, share in found.items() if share is not None}
    spent = {name: sum(seconds.get(phase, 0.0) for phase in PARTS[name]) for name in found}
    found["step"] = sum(share * spent[name] for name, share in found.items()) / seconds["step"]
    return {f"speed/idle/{name}": share for name, share in found.items()}


def waiting(each: Sequence[float]) -> float | None:
    """1 - mean / largest; None where nobody did anything."""
    return 1 - sum(each) / len(each) / max(each) if any(each) else None


def hardware(peak: float | None) -> dict[str, Any]:
    """What a run ran on, to be written beside its figures."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU, {os.cpu_count()} cores"
    nodes = -(-distributed.world_size() // distributed.node_size())
    known = {"peak_tflops": peak / 1e12} if peak else {}
    return {"device": gpu, "gpus": distributed.world_size(), "nodes": nodes, **known}
