"""Stages of tools/gpu_acceptance.py between trainer and engine: weight sync, sleeping memory, checkpoints. One GPU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from gpu_stages.machine import Machine, Row
from gpu_stages.training import QWEN_7B, SMALL, make_architecture, make_batch, make_config, make_policy, make_update
from oreal_megatron.config import ParallelConfig
from oreal_megatron.mcore import checkpoint_state, parallel
from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver
from oreal_megatron.mcore.saved_model import SavedModel
from oreal_megatron.models import tensors
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.reshard import vllm_layout
from oreal_megatron.reshard.overlaps import ReshardLayout
from oreal_megatron.reshard.weight_sync import EngineWeightSync, WeightMismatch

QWEN_05B = dict(
    hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2, vocab_size=151936
)
GIB = 2**30


class Parameters:
    """Engine's side of a weight sync: vLLM's parameters of one rank, without vLLM."""

    awake, version = True, -1

    def __init__(self, arch: Architecture, device: torch.device):
        shapes = vllm_layout.parameter_shapes(arch, 1)
        self.tensors = {
            name: torch.full(shape, float("nan"), dtype=torch.bfloat16, device=device) for name, shape in shapes.items()
        }

    def live(self) -> tuple[dict[str, Tensor], str]:
        """Return the parameters, which can be written."""
        return self.tensors, ""

    def wake(self) -> None:
        """Do nothing: the memory stays."""

    def accept(self, version: int) -> None:
        """Take the weights as those of a version."""
        self.version = version


def sync(machine: Machine) -> Iterator[Row]:
    """Time a weight sync of a 7B shape with its checksums, and flip one bit of the engine's weights."""
    arch = make_architecture(2 if machine.dry else 28, **(SMALL if machine.dry else QWEN_7B))
    shards = [
        (entry, machine.random(*entry.shard_shape(1)) if "norm" not in entry.megatron else _ones(entry, machine))
        for entry in tensors.entries(arch, 1, 1, 0, "lm")
    ]
    parallel.start_process_group()
    try:
        engine = Parameters(arch, machine.device)
        layout = ReshardLayout(arch, 1, 1, 1, 1, 1, 1)
        weights = EngineWeightSync(layout, "direct", 512 * 2**20, lambda: shards, _no_gathering, engine, nullcontext)
        weights.send(1)
        seconds = machine.wall_seconds(lambda: weights.send(2))
        yield machine.at_most("sync", "transfer and checksums of a 7B shape", seconds, 0.5, "s", speed=True)
        extra = machine.peak_bytes(lambda: weights.send(3)) / GIB
        yield machine.at_most("sync", "memory beyond both sides", extra, 1.0, "GiB", speed=True)
        assert weights.engine_checksum is not None
        name, flipped = next(iter(engine.tensors.items()))
        flipped.view(torch.int16)[0, 0] ^= 1
        differing = [mismatch.name for mismatch in weights.engine_checksum.mismatches()]
        yield machine.at_most("sync", f"tensors reported beside {name}, of which one bit is flipped",
                              abs(differing.count(name) - 1) + len(set(differing) - {name}), 0)  # fmt: skip
    finally:
        dist.destroy_process_group()


def _ones(entry: tensors.Entry, machine: Machine) -> Tensor:
    return torch.ones(entry.shard_shape(1), dtype=torch.bfloat16, device=machine.device)


def _no_gathering(_: object) -> Iterator[tuple[str, Tensor]]:
    raise WeightMismatch("the layout of the parameters is not vLLM's")


def checkpoint(machine: Machine) -> Iterator[Row]:
    """Time the copy of a checkpoint that training waits for, and load it into another model."""
    arch = make_architecture(2 if machine.dry else 24, **(SMALL if machine.dry else QWEN_05B))
    parallel.start_process_group()
    parallel.start_megatron(ParallelConfig(), seed=0)
    try:
        policy, fresh = (make_policy(arch, make_config("bfloat16", offload=True), machine) for _ in range(2))
        make_update(policy, make_batch(2, 64, arch.vocab))()
        with tempfile.TemporaryDirectory() as folder:
            saver = CheckpointSaver(Path(folder), {"policy": policy}, keep=1)
            saver.save(1)
            started_at = time.monotonic()
            saver.start(2)
            copying = time.monotonic() - started_at
            saver.finish()
            writing = time.monotonic() - started_at - copying
            size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            checkpoint_state.load(Path(folder) / "step_000002", {"policy": fresh})
        yield machine.measured("checkpoint", "weights and optimizer", size / 1e9, "GB")
        limit = size / 1e9  # 1 GB/s
        yield machine.at_most("checkpoint", "copy that training waits for", copying, limit, "s", speed=True)
        yield machine.measured("checkpoint", "writing beside training", writing, "s")
        differing = _differing_tensors(policy, fresh)
        yield machine.at_most("checkpoint", "tensors that differ after loading", differing, 0)
    finally:
        parallel.stop()


def _differing_tensors(*models: SavedModel) -> int:
    """Return how many weights and optimizer states differ between two models."""
    states = []
    for model in models:
        with model.parts.on_device(*model.saved_parts), model.readable():
            state = checkpoint_state.sharded(model, loading=False)
            states.append([part.data.cpu().clone() for part in checkpoint_state.tensors_of(state)])
    return sum(not torch.equal(*pair) for pair in zip(*states, strict=True))
