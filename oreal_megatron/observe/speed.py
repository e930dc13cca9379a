"""Formulas of the speed of a step; docs/evidence/speed.md defines every term.

Tokens per second per GPU are counted as in NeMo-RL (docs/about/performance-summary.md, `print_performance_metrics` in
nemo_rl/algorithms/utils.py of https://github.com/NVIDIA-NeMo/RL): the tokens a phase processes, prompts included,
divided by its seconds and the number of GPUs; for the step, all tokens of all rollouts divided by its seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from oreal_megatron.algo import guard
from oreal_megatron.config import Config
from oreal_megatron.models import flops
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.protocols import Metrics
from oreal_megatron.records import Batch, MicroBatch
from oreal_megatron.runtime import distributed

# Cost of a phase in forward passes; a backward pass counts as two. Recomputation is not counted.
FORWARD_PASSES = {"reward_model": 3, "reference": 1, "policy": 3}
HEADS = {"reward_model": "scalar", "reference": "lm", "policy": "lm"}
PARTS = {
    "generate": ("generate",),
    "verify": ("verify",),
    "training": tuple(FORWARD_PASSES),
    "sync": ("weight_sync",),
}


@dataclass(frozen=True)
class ReplicaWork:
    """Size of what one data-parallel replica trains on in a step."""

    micro_batches: int
    mini_batches: int  # updates of the policy that they are split among
    tokens: int
    forward: dict[str, float]  # operations of one forward pass by kind of head; {} if the model is unknown


def replica_work(batch: Batch, arch: Architecture | None) -> ReplicaWork:
    """Count tokens and operations of a batch: no filler, and the head at action tokens only."""
    lengths = [length for part in batch.micro_batches for length in _sequence_lengths(part)]
    action_tokens = sum(len(part.labels) for part in batch.micro_batches)
    forward = {head: flops.forward(arch, lengths, action_tokens, head) for head in ("lm", "scalar")} if arch else {}
    return ReplicaWork(len(batch.micro_batches), len(batch.split()), sum(lengths), forward)


def _sequence_lengths(part: MicroBatch) -> list[int]:
    """Return the tokens of each sequence, without the filler that follows them."""
    sequences = int(part.reward.count_nonzero())
    return [stop - start for start, stop in pairwise(part.sequence_offsets)][:sequences]


def computed_models(config: Config, metrics: Metrics, seconds: Mapping[str, float]) -> list[str]:
    """Return the models that computed something in this step; a policy without token weights does not."""
    idle = [] if config.reward_model.enabled else ["reward_model"]
    idle += ["policy"] if "reward_model" in guard.skipped_models(metrics) else []
    return [name for name in FORWARD_PASSES if name in seconds and name not in idle]


def operations(model: str, works: Sequence[ReplicaWork], config: Config) -> float:
    """Return the operations of a model's phase over all replicas."""
    return _forward_passes(model, config) * sum(work.forward[HEADS[model]] for work in works)


def _forward_passes(model: str, config: Config) -> int:
    """Return the cost of a model's phase in forward passes over the samples of the step."""
    return FORWARD_PASSES[model] * (config.loss.passes if model == "policy" else 1)


def pipeline_fills(models: Iterable[str], mini_batches: int, config: Config) -> float:
    """Return how often the pipeline fills and drains in a pass over the step's samples, mean over the passes of models.

    The policy makes an update of each mini-batch; reward model and reference take all samples in one go.
    """
    costs = {name: _forward_passes(name, config) for name in models}
    fills = {name: mini_batches if name == "policy" else 1 for name in costs}
    return sum(costs[name] * fills[name] for name in costs) / sum(costs.values())


def rates(
    seconds: Mapping[str, float],
    tokens: Mapping[str, int],
    computed: Mapping[str, float],
    gpus: int,
    peak_flops: float | None,
) -> Metrics:
    """Return tokens and operations of each phase per second and GPU; no MFU if the peak is unknown.

    Phases that are not in `tokens` or `computed` have no rate.
    """
    result = {}
    for name, count in tokens.items():
        if seconds.get(name):
            result[f"speed/tokens_per_second_per_gpu/{name}"] = count / seconds[name] / gpus
    for name, amount in computed.items():
        if seconds.get(name):
            rate = amount / seconds[name] / gpus
            result[f"speed/tflops_per_second_per_gpu/{name}"] = rate / 1e12
            if peak_flops:
                result[f"speed/mfu/{name}"] = rate / peak_flops
    return result


def shares_of_step(seconds: Mapping[str, float]) -> Metrics:
    """Return the share of the step spent in each part; "other": parity check, checkpoints, packing, files."""
    spent = {part: sum(seconds.get(name, 0.0) for name in names) for part, names in PARTS.items()}
    spent["other"] = seconds["step"] - sum(spent.values())
    return {f"speed/share/{part}": value / seconds["step"] for part, value in spent.items()}


def idle_shares(
    seconds: Mapping[str, float], own_seconds: Sequence[Mapping[str, float]], forward: Sequence[float]
) -> Metrics:
    """Return the share of its time that the mean rank waits for the slowest one.

    Measured for generate and verify, where ranks work alone. Training ranks wait for each other all the time, so that
    the operations assigned to the replicas stand for it. {} where nothing was measured.
    """
    waits = {name: load_imbalance([own.get(name, 0.0) for own in own_seconds]) for name in ("generate", "verify")}
    waits["training"] = load_imbalance(forward)
    shares = {name: share for name, share in waits.items() if share is not None}
    spent = {name: sum(seconds.get(phase, 0.0) for phase in PARTS[name]) for name in shares}
    of_step = {"step": sum(share * spent[name] for name, share in shares.items()) / seconds["step"]} if shares else {}
    return {f"speed/idle/{name}": share for name, share in (shares | of_step).items()}


def load_imbalance(loads: Sequence[float]) -> float | None:
    """Return 1 - mean / maximum; None if all loads are 0."""
    return 1 - sum(loads) / len(loads) / max(loads) if any(loads) else None


def hardware(peak_flops: float | None) -> dict[str, Any]:
    """Return the hardware of a run, to be written beside its figures."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU, {os.cpu_count()} cores"
    nodes = -(-distributed.world_size() // distributed.node_size())
    peak = {"peak_tflops": peak_flops / 1e12} if peak_flops else {}
    return {"device": gpu, "gpus": distributed.world_size(), "nodes": nodes, **peak}
