"""A value that is not finite is named where it first appears: tensor of a file, parameter and rank, or module."""

from __future__ import annotations

import math

import torch

from oreal_megatron.records import Sample


def describe(folder: str, samples: list[Sample]) -> dict[str, str]:
    """Return what a rank of two pipeline stages reports of planted values, and the refusal of a file with NaN."""
    from oreal_megatron import config as c
    from oreal_megatron.algo import packing
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import parallel, trained_models
    from oreal_megatron.models import architecture

    config = c.Config(model=c.ModelConfig(folder), parallel=c.ParallelConfig(pipeline=2))
    source = HFFolder(folder)
    arch = architecture.read(source.config)
    parallel.start_process_group()
    parallel.start_megatron(config.parallel, seed=0)
    policy = trained_models.Policy(arch, config, source.tensor)
    batch = packing.batch(samples, parallel.packing_spec(4096))
    result = {"sound": policy.find_non_finite(batch)}
    parameters = dict(policy.chunks[0].named_parameters())
    layer = next(
        tensor for name, tensor in parameters.items() if name.endswith("decoder.layers.1.mlp.linear_fc2.weight")
    )
    for name, value in (("nan", math.nan), ("huge", 3e38)):
        before = layer.detach().clone()
        with torch.no_grad():
            layer[3, 5] = value if name == "nan" else before[3, 5]
            if name == "huge":
                layer.fill_(value)
        result[name] = policy.find_non_finite(batch)
        with torch.no_grad():
            layer.copy_(before)

    def damaged(name: str) -> torch.Tensor:
        tensor = source.tensor(name)
        if name == "model.layers.1.self_attn.k_proj.weight":
            tensor[0, 0] = math.inf
        return tensor

    try:
        trained_models.Reference(arch, config, damaged)
    except c.ConfigError as refusal:
        result["file"] = str(refusal)
    parallel.stop()
    return result


def test_the_first_value_that_is_not_finite_is_named(model_folder, in_processes, make_samples):
    first, last = in_processes(2, describe, str(model_folder), make_samples(3))
    assert first["sound"] == last["sound"] == ""
    name = "decoder.layers.{}.mlp.linear_fc2.weight"
    assert first["nan"] == f"parameter {name.format(1)} is nan at [3, 5] (1 such values)"
    assert last["nan"] == f"parameter {name.format(3)} is nan at [3, 5] (1 such values)", "numbers count whole models"
    assert first["huge"] == "all weights are finite, but the output of decoder.layers.1.mlp.linear_fc2 is not"
    assert "decoder.layers.3.mlp.linear_fc2" in last["huge"] or "decoder.layers.2" in last["huge"]
    assert "model.layers.1.self_attn.k_proj.weight holds values that are not finite" in first["file"]
    assert "file" not in last, "the rank that does not hold the tensor"
