"""Idle models leave the device and come back unchanged: the same training, bit by bit, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oreal_megatron.records import Sample

CASES = [(dtype, offload) for dtype in ("float32", "bfloat16") for offload in (False, True)]


def every_case(folder: str, samples: list, scratch: str) -> dict:
    from megatron.core import parallel_state

    from oreal_megatron.config import ParallelConfig
    from oreal_megatron.mcore import parallel

    parallel.start_process_group()
    results = {}
    for dtype, offload in CASES:
        parallel.start_megatron(ParallelConfig(), seed=0)
        results[dtype, offload] = trained(folder, samples, offload, dtype, f"{scratch}/{dtype}_{offload}")
        parallel_state.destroy_model_parallel()
    parallel.start_megatron(ParallelConfig(), seed=0)
    parallel.stop()
    return results


def trained(folder: str, samples: list, offload: bool, dtype: str, scratch: str) -> dict:
    """Weights after two steps, and after the second again from the checkpoint between; the bytes on the device while
    each model computes, and while it is saved and loaded."""
    from oreal_megatron import config as c
    from oreal_megatron.algo import packing
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import checkpoint_state, parallel, trained_models
    from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver
    from oreal_megatron.models import architecture
    from oreal_megatron.reshard.weight_sync import full_tensors

    optimizer = c.OptimizerConfig(lr=1e-2, warmup_steps=0)
    config = c.Config(
        model=c.ModelConfig(folder, dtype),
        optimizer=optimizer,
        offload=offload,
        loss=c.LossConfig(kl_coef=0.5),
        reward_model=c.RewardModelConfig(head_init="normal"),
    )
    source = HFFolder(folder)
    pieces = (architecture.read(source.config), config, source.tensor)
    models = {"policy": trained_models.Policy(*pieces), "reward_model": trained_models.TokenRewardModel(*pieces)}
    models["reference"] = trained_models.Reference(*pieces)

    def bytes_here() -> dict[str, dict[str, int]]:
        return {name: {part: held.bytes() for part, held in model.parts.items()} for name, model in models.items()}

    seen = {"at rest": bytes_here()}
    for name, model in models.items():
        model.chunks[0].register_forward_pre_hook(lambda *_, name=name: seen.update({name: bytes_here()}))
    sharded, stored = checkpoint_state.sharded, {}

    def watched(trainer, loading: bool) -> dict:
        stored[trainer, loading] = bytes_here()
        return sharded(trainer, loading)

    checkpoint_state.sharded = watched
    batch = packing.batch(samples, parallel.packing_spec(60))
    trainers = {name: models[name] for name in ("policy", "reward_model")}

    def step() -> dict[str, torch.Tensor]:
        token_weights, _ = models["reward_model"].update(batch)
        models["policy"].update(batch, models["reference"].score(batch), token_weights)
        return {name: tensor.clone() for name, tensor in full_tensors(models["policy"])}

    step()
    saved = CheckpointSaver(Path(scratch), trainers, keep=1).save(0)
    unbroken = step()
    checkpoint_state.load(saved, trainers)
    weights = step()
    checkpoint_state.sharded = sharded
    seen["afterwards"] = bytes_here()
    stored = [(name, stored[model, loading]) for name, model in trainers.items() for loading in (False, True)]
    return {"seen": seen, "stored": stored, "weights": weights, "unbroken": unbroken}


@pytest.fixture(scope="module")
def results(model_folder, in_processes, tmp_path_factory) -> dict:
    samples = [
        Sample((5, 6), (7 + place % 9,) * (place + 1), reward, reward) for place in range(4) for reward in (1.0, -1.0)
    ]
    return in_processes(1, every_case, str(model_folder), samples, str(tmp_path_factory.mktemp("runs")))[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloading_changes_no_bit_and_leaves_only_the_model_at_work(dtype, results):
    kept, offloaded = results[dtype, False], results[dtype, True]
    for again in (kept["weights"], offloaded["unbroken"], offloaded["weights"]):
        assert all(torch.equal(again[name], value) for name, value in kept["unbroken"].items())
    everything = kept["seen"]["at rest"]
    assert all(size > 0 for parts in everything.values() for size in parts.values())
    for name, there in offloaded["seen"].items():
        for model, parts in there.items():
            assert parts == (everything[model] if model == name else dict.fromkeys(parts, 0)), (name, model)
    for name, there in offloaded["stored"]:
        for model, parts in there.items():
            held = everything[model] | {"gradients": 0} if model == name else dict.fromkeys(parts, 0)
            assert parts == held, (name, model)


def test_pinned_pieces_are_whole_powers_of_two():
    """torch's pinned allocator rounds each up to one: less than 32 KiB are lost of any storage."""
    from oreal_megatron.mcore import offload

    for size in (0, 1, 2**16 - 1, 2**16, 2**16 + 1, 3 * 2**20, 5120 * 27648 * 4 // 3):
        sizes = offload._block_sizes(size)
        taken = sum(1 << (piece - 1).bit_length() for piece in sizes)
        assert sum(sizes) == size and all(sizes) and 0 <= taken - size < 2**15
    storage = torch.arange(2**17 + 5, dtype=torch.float32).untyped_storage()
    held, before = offload._as_bytes(storage), offload._as_bytes(storage).clone()
    copies = offload._to_host(storage)
    held.zero_()
    offload._from_host(copies, storage)
    assert len(copies) > 1 and torch.equal(held, before)
