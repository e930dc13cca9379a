"""Idle models leave the device and come back unchanged: the same training, bit by bit, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def trained(folder: str, samples: list, offload: bool, dtype: str, scratch: str) -> dict:
    """Weights after two steps with a checkpoint between, and the bytes on the device while each model computes."""
    from oreal_megatron import config as c
    from oreal_megatron.algo import pack
    from oreal_megatron.cli import build
    from oreal_megatron.convert.hf_folder import Folder
    from oreal_megatron.mapping import architecture
    from oreal_megatron.mcore import checkpoint, parallel, roles

    optimizer = c.Optimizer(lr=1e-2, warmup_steps=0)
    config = c.Config(model=c.Model(folder, dtype), optimizer=optimizer, offload=offload, loss=c.Loss(kl_coef=0.5))
    source = Folder(folder)
    pieces = (architecture.read(source.config), config, source.tensor)
    parallel.start_process_group()
    parallel.start_megatron(config.parallel, seed=0)
    models = {"policy": roles.Policy(*pieces), "reward_model": roles.TokenRewardModel(*pieces)}
    models["reference"] = roles.Reference(*pieces)

    def bytes_here() -> dict[str, dict[str, int]]:
        return {name: {part: held.bytes() for part, held in model.parts.items()} for name, model in models.items()}

    seen = {"at rest": bytes_here()}
    for name, model in models.items():
        model.chunks[0].register_forward_pre_hook(lambda *_, name=name: seen.update({name: bytes_here()}))
    batch = pack.batch(samples, 60, *parallel.data_parallel())
    trainers = {name: models[name] for name in ("policy", "reward_model")}
    for step in range(2):
        weight, _ = models["reward_model"].update(batch)
        models["policy"].update(batch, models["reference"].score(batch), weight)
        checkpoint.save(Path(scratch), step, trainers, 1)
        checkpoint.load(Path(scratch) / f"step_{step:06d}", trainers)
    seen["afterwards"] = bytes_here()
    weights = {name: tensor.clone() for name, tensor in build.full_tensors(models["policy"])}
    parallel.stop()
    return {"seen": seen, "weights": weights}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloading_changes_no_bit_and_leaves_only_the_model_at_work(
    dtype, model_folder, in_processes, make_samples, tmp_path
):
    kept, offloaded = (
        in_processes(1, trained, str(model_folder), make_samples(4, seed=6), offload, dtype, str(tmp_path / str(offload)))[0]
        for offload in (False, True)
    )
    assert all(torch.equal(offloaded["weights"][name], value) for name, value in kept["weights"].items())
    everything = kept["seen"]["at rest"]
    assert all(size > 0 for parts in everything.values() for size in parts.values())
    for name, there in offloaded["seen"].items():
        for model, parts in there.items():
            assert parts == (everything[model] if model == name else dict.fromkeys(parts, 0)), (name, model)
