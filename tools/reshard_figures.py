"""Bytes that resharding moves in the layouts of the recipes, the lower bound, and the bytes of an all-gather.

    python tools/reshard_figures.py

Computed, not measured: `received` is what the plan of the direct transport lets a rank receive (mean and most, GB of
1e9 bytes, bfloat16), `least` the bytes that it needs and does not hold, `between` what crosses between nodes of 8 ranks
for each rank and the least of that, `all-gather` what a rank receives when every full tensor goes to every rank. `wire`
is the time of the direct transport on 450 GB/s within and 50 GB/s between nodes with no latency (an
assumption, not a measurement). `planned` are the CPU seconds of planning for one rank, on this machine.
"""

from __future__ import annotations

import time

from oreal_megatron.models import architecture
from oreal_megatron.reshard import planner
from oreal_megatron.reshard.overlaps import ReshardLayout, overlaps

SIZES = {"7B": (28, 3584, 18944, 28, 4), "32B": (64, 5120, 27648, 40, 8)}
# Model, trainer's tensor, pipeline and data parallelism, ranks of a replica of the engine.
LAYOUTS = (
    ("7B", 4, 2, 1, 1), ("7B", 4, 2, 1, 2), ("7B", 4, 1, 2, 1), ("7B", 2, 1, 4, 1), ("7B", 4, 2, 2, 1),
    ("32B", 8, 2, 1, 4), ("32B", 8, 2, 1, 8), ("32B", 8, 1, 2, 4), ("32B", 4, 2, 1, 4), ("32B", 4, 4, 1, 2),
    ("32B", 8, 2, 8, 4),
)  # fmt: skip
NODE, ITEMSIZE, BATCH_BYTES = 8, 2, 128 * 2**20


def architecture_of(size: str) -> architecture.Architecture:
    layers, hidden, ffn, heads, groups = SIZES[size]
    return architecture.read(
        dict(architectures=["Qwen2ForCausalLM"], num_hidden_layers=layers, hidden_size=hidden, intermediate_size=ffn,
             num_attention_heads=heads, num_key_value_heads=groups, vocab_size=152064, max_position_embeddings=32768,
             rope_theta=1e6)
    )  # fmt: skip


def row(size: str, tensor: int, pipeline: int, data: int, engine: int) -> str:
    world = tensor * pipeline * data
    layout = ReshardLayout(architecture_of(size), tensor, pipeline, 1, engine, world, NODE)
    start = time.process_time()
    plan = planner.plan_transfer(layout, world - 1, ITEMSIZE, BATCH_BYTES)
    seconds = time.process_time() - start
    traffic = plan.traffic
    wire = max(((traffic.received - traffic.received_between) / 450e9).max(), (traffic.received_between / 50e9).max())
    total = sum(part.rows * part.columns for part in overlaps(layout)) * ITEMSIZE / 1e9
    gathered = total * (1 - 1 / tensor) + total / tensor * (1 - 1 / pipeline)
    return (
        f"| {size} | {tensor} x {pipeline} x {data} | {engine} x {world // engine} "
        f"| {traffic.received.mean() / 1e9:.2f} / {traffic.received.max() / 1e9:.2f} "
        f"| {traffic.minimum_received.mean() / 1e9:.2f} / {traffic.minimum_received.max() / 1e9:.2f} "
        f"| {traffic.received_between.sum() / world / 1e9:.2f} | {traffic.minimum_between / world / 1e9:.2f} "
        f"| {gathered:.2f} | {1e3 * wire:.0f} | {len(plan.batches)} | {seconds:.2f} |"
    )


def main() -> None:
    print("| model | tensor x pipeline x data | engine x replicas | received, mean / most | least, mean / most "
          "| between | least | all-gather | wire, ms | batches | planned, s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for layout in LAYOUTS:
        print(row(*layout), flush=True)


if __name__ == "__main__":
    main()
