"""Figures of docs/evidence/scale.md: packed against padded micro-batches, the cost of the CPU shim,
bytes of every model in every phase. One process, one thread, a small model; some minutes.

    python tools/scale_figures.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from oreal_megatron import config as c
from oreal_megatron.algo import packing, selection
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.mcore import checkpoint_state, megatron_patches, parallel, trained_models
from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver
from oreal_megatron.mcore.trainer import MegatronTrainer
from oreal_megatron.models import architecture
from oreal_megatron.records import Batch, MicroBatch, PackingSpec, Sample

LONGEST, BUDGET, SAMPLES, ROUNDS = 512, 1024, 32, 7


def main() -> None:
    torch.set_num_threads(1)
    parallel.start_process_group()
    parallel.start_megatron(c.ParallelConfig(), seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = small_model(Path(scratch) / "model")
        show_packing(folder)
        show_cpu_shim(folder)
        for dtype in ("float32", "bfloat16"):
            show_memory(folder, dtype)
    parallel.stop()


def small_model(folder: Path) -> HFFolder:
    spec = importlib.util.spec_from_file_location("task", Path(__file__).with_name("make_addition_task.py"))
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    task.make_model(folder, seed=1)
    return HFFolder(folder)


def drawn() -> list[Sample]:
    """Log-normal lengths, a thirty-second of a reasoner's: half below 93 tokens, none above 512."""
    generator = random.Random(3)
    lengths = [max(8, min(LONGEST, round(generator.lognormvariate(8.0, 0.9) / 32))) for _ in range(SAMPLES)]
    return [Sample((5, 6), tuple(7 + place % 9 for place in range(n - 2)), sign, sign)
            for n, sign in zip(lengths, [1.0, -1.0] * SAMPLES, strict=False)]  # fmt: skip


def padded(samples: list[Sample]) -> Batch:
    """Rows of one width, sorted by length, as long as rows x width stays in the budget: what packing replaces."""
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=len, reverse=True):
        if groups and len(groups[-1][0]) * (len(groups[-1]) + 1) <= BUDGET:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return Batch(tuple(rows(group) for group in groups), selection.counts(samples))


def rows(group: list[Sample]) -> MicroBatch:
    width = len(group[0])
    whole = packing.micro_batch(
        [Sample((*s.prompt_tokens, *s.response_tokens, *[0] * (width - len(s))), (), 0.0, 0.0) for s in group]
    )
    real = packing.micro_batch(group)
    shift = torch.tensor([row * width - real.sequence_offsets[row] for row in range(len(group))])
    index = real.action_index + shift.repeat_interleave(real.action_offsets.diff())
    return dataclasses.replace(
        real,
        tokens=whole.tokens,
        positions=whole.positions,
        sequence_offsets=whole.sequence_offsets,
        action_index=index,
    )


def policy_step(folder: HFFolder, batch: Batch) -> Callable[[], object]:
    config = c.Config()
    pieces = (architecture.read(folder.config), config, folder.tensor)
    policy, token_weights = trained_models.Policy(*pieces), trained_models.NoRewardModel(config).update(batch)[0]
    reference = policy.score(batch)
    return lambda: policy.update(batch, reference, token_weights)


def seconds(steps: list[Callable[[], object]]) -> list[float]:
    """CPU time of the fastest of some runs of each, which take turns: the machine may be shared."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(ROUNDS):
        for step, taken in zip(steps, times, strict=True):
            begin = time.process_time()
            step()
            taken.append(time.process_time() - begin)
    return [min(taken) for taken in times]


def show_packing(folder: HFFolder) -> None:
    samples = drawn()
    tokens, batches = sum(map(len, samples)), [packing.batch(samples, PackingSpec(BUDGET)), padded(samples)]
    times = seconds([policy_step(folder, batch) for batch in batches])
    for name, batch, taken in zip(("packed", "padded"), batches, times, strict=True):
        there = sum(len(part.tokens) for part in batch.micro_batches)
        print(f"{name}: {taken:.3f} s, {len(batch.micro_batches)} micro-batches, {1 - tokens / there:.1%} padding")
    print(f"packed / padded: {times[0] / times[1]:.2f}")


def show_cpu_shim(folder: HFFolder) -> None:
    """Print the number of calls of the CPU patches (mcore/megatron_patches.py) in a step, times their extra cost."""
    step, calls, saved = (
        policy_step(folder, packing.batch(drawn(), PackingSpec(BUDGET))),
        [],
        dict(megatron_patches.CPU_PATCHES),
    )

    def counted(stand_in: Callable) -> Callable:
        return lambda *args, **kwargs: calls.append(1) or stand_in(*args, **kwargs)

    try:
        for name, (owner, attribute, stand_in) in saved.items():
            megatron_patches.CPU_PATCHES[name] = megatron_patches.Patch(owner, attribute, counted(stand_in))
        step()
    finally:
        megatron_patches.CPU_PATCHES.update(saved)
    (taken,) = seconds([step])
    rounds, made = 2000, megatron_patches.CPU_PATCHES["zeros"][2]
    bare, through = (
        min(timeit.repeat("f(1, device='cpu')", number=rounds, globals={"f": f})) / rounds for f in (torch.zeros, made)
    )
    cost = len(calls) * (through - bare)
    print(f"CPU shim: {len(calls)} calls, {cost * 1e6:.0f} us, {cost / taken:.2%} of a step of {taken:.3f} s")


def show_memory(folder: HFFolder, dtype: str) -> None:
    """Tensor bytes on the device while models compute or are saved, with offloading; a part that is away has none."""
    config = c.Config(model=c.ModelConfig(dtype=dtype), offload=True)
    pieces = (architecture.read(folder.config), config, folder.tensor)
    batch = packing.batch(drawn()[:4], PackingSpec(BUDGET))
    models = {"policy": trained_models.Policy(*pieces), "reward_model": trained_models.TokenRewardModel(*pieces)}
    models["reference"] = trained_models.Reference(*pieces)
    parts = [(name, part) for name, model in models.items() for part in model.parts]
    table: dict[str, list[int]] = {}

    def record(phase: str) -> None:
        table[phase] = [models[name].parts[part].bytes() for name, part in parts]

    for name, model in models.items():
        model.chunks[0].register_forward_pre_hook(lambda *_, name=name: record(name))
    record("generate")
    token_weights, _ = models["reward_model"].update(batch)
    models["policy"].update(batch, models["reference"].score(batch), token_weights)
    with models["policy"].readable():
        record("weight_sync")
    trained, sharded = {name: models[name] for name in ("reward_model", "policy")}, checkpoint_state.sharded

    def watched(trainer: MegatronTrainer, loading: bool) -> dict[str, Any]:
        record(next(f"save, {name}" for name, model in trained.items() if model is trainer))
        return sharded(trainer, loading)

    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(checkpoint_state, "sharded", watched):
        CheckpointSaver(Path(scratch), trained, keep=1).save(1)
    print(
        f"\nKiB of tensors on the device, {dtype}, offload=True\n| phase | " + " | ".join(map(" ".join, parts)) + " |"
    )
    print("|---" * (len(parts) + 1) + "|")
    for phase, sizes in table.items():
        print(f"| {phase} | " + " | ".join(f"{size / 1024:.0f}" for size in sizes) + " |")


if __name__ == "__main__":
    main()
