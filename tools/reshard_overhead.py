"""Overhead of a weight transfer: two gloo processes, as many tensors as a 32B model has, all of them tiny.

    python tools/reshard_overhead.py

Trainer of tensor parallelism 2, two engines of one rank each, both nodes of their own; 64 layers of hidden size 64 with
biases. Median of 20 transfers after the first, of the first rank: wall clock and the process's own CPU time, in ms. On
a machine with other work the second is the one to read.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from oreal_megatron.models import architecture, tensors
from oreal_megatron.reshard import planner, vllm_layout
from oreal_megatron.reshard.byte_counter import ByteCounter
from oreal_megatron.reshard.checksum import EngineChecksum
from oreal_megatron.reshard.direct_transport import DirectTransfer
from oreal_megatron.reshard.overlaps import ReshardLayout

REPEATS = 20


def measured(what: str, call: Callable[[], Any], repeats: int = 1) -> Any:
    wall, own, result = [], [], None
    for _ in range(repeats):
        dist.barrier()
        begin, cpu = time.perf_counter(), time.process_time()
        result = call()
        wall.append(time.perf_counter() - begin)
        own.append(time.process_time() - cpu)
    if dist.get_rank() == 0:
        print(f"| {what} | {1e3 * statistics.median(wall):.1f} | {1e3 * statistics.median(own):.1f} |", flush=True)
    return result


def process(rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    arch = architecture.read(
        dict(architectures=["Qwen2ForCausalLM"], num_hidden_layers=64, hidden_size=64, intermediate_size=96,
             num_attention_heads=4, num_key_value_heads=2, vocab_size=256, max_position_embeddings=512, rope_theta=1e6)
    )  # fmt: skip
    layout = ReshardLayout(arch, 2, 1, 1, 1, 2, 1)
    trainer_tensors = {
        entry.megatron: torch.randn(entry.shard_shape(2)) for entry in tensors.entries(arch, 2, 1, 0, "lm")
    }
    for name, full in trainer_tensors.items():
        if "norm" in name:  # replicated
            full.fill_(1)
    parameters = {name: torch.empty(shape) for name, shape in vllm_layout.parameter_shapes(arch, 1).items()}
    plan = measured("plan, once", lambda: planner.plan_transfer(layout, rank, 4, 2**20))
    direct = measured("views, once", lambda: DirectTransfer(plan, trainer_tensors, parameters))
    checksums = measured(
        "views for the checksum, once", lambda: EngineChecksum(layout, plan, rank, trainer_tensors, parameters)
    )
    direct.run(ByteCounter(1))
    measured("transfer", lambda: direct.run(ByteCounter(1)), REPEATS)
    wrong = measured("checksum", checksums.mismatches, REPEATS)
    if rank == 0:
        overlaps = sum(len(batch.sends) + len(batch.receives) + len(batch.copies) for batch in plan.batches)
        sides = f"{len(trainer_tensors)} tensors of the trainer, {len(parameters)} of the engine"
        print(
            f"\n{sides}, {overlaps} overlaps on this rank, {len(plan.batches)} batches; {len(wrong)} parameters differ"
        )
    dist.destroy_process_group()


def main() -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29617")}
    print("| | wall, ms | CPU of the process, ms |\n|---|---|---|", flush=True)
    workers = [multiprocessing.get_context("spawn").Process(target=process, args=(rank,)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a process failed; its message is above")


if __name__ == "__main__":
    main()
