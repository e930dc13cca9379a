"""Stage of tools/gpu_acceptance.py: updates of a policy under Megatron, with random weights, on one GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from gpu_machine import Machine, Row
from torch import Tensor

from oreal_megatron.algo import packing
from oreal_megatron.config import Config, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from oreal_megatron.mcore import parallel, trained_models
from oreal_megatron.models import architecture, flops, tensors
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.records import Batch, Sample

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FUSED_ROTARY = {"apply_rope_fusion": True}
PEAK_FLOPS = 989e12  # dense bf16 of H100 SXM and H200
SMALL = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, vocab_size=512)
QWEN_7B = dict(
    hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064
)


def training(machine: Machine) -> Iterator[Row]:
    """Compare gradients in bf16 with fp32, offloading with none; time layers of a 7B shape and measure their memory."""
    parallel.start_process_group()
    parallel.start_megatron(ParallelConfig(), seed=0)
    try:
        yield from _equalities(machine)
        yield from _speed(machine)
    finally:
        parallel.stop()


def _equalities(machine: Machine) -> Iterator[Row]:
    """Yield how much gradients and weights differ that should be close, or equal."""
    small, batch = make_architecture(2, **SMALL), make_batch(2, 100, 512)
    exact = _gradient(small, batch, make_config("float32"), machine).double()
    for name, megatron in (("bf16", {}), ("bf16, fused rotary embedding,", FUSED_ROTARY)):
        gradient = _gradient(small, batch, make_config("bfloat16", megatron=megatron), machine).double()
        cosine = torch.nn.functional.cosine_similarity(exact, gradient, 0)
        yield machine.at_most("training", f"1 - cosine of {name} and fp32 gradients", 1 - float(cosine), 1e-3)
    weights = [
        _weights_after(small, batch, make_config("bfloat16", offload), machine) for offload in (False, False, True)
    ]
    repeated, offloaded = (
        sum(not torch.equal(*pair) for pair in zip(weights[0], other, strict=True)) for other in weights[1:]
    )
    yield machine.at_most("training", "tensors that differ in a second run", repeated, 0)
    yield machine.at_most("training", "tensors that differ with offloading", offloaded, 0)


def _speed(machine: Machine) -> Iterator[Row]:
    """Yield milliseconds per layer, model FLOP/s utilisation and memory, without and with recomputation."""
    shape, tokens = (SMALL, 256) if machine.dry else (QWEN_7B, 16384)
    depths = (1, 2) if machine.dry else (2, 6) if machine.gib > 100 else (2, 4)
    batch = make_batch(2, tokens // 2, shape["vocab_size"])
    few, many = (flops.forward(make_architecture(depth, **shape), [tokens / 2] * 2, tokens) for depth in depths)
    kinds = (
        ("without recomputation", {}, 0.45),
        ("with the fused rotary embedding", FUSED_ROTARY, 0.45),
        ("with recomputation", RECOMPUTE, 0.34),
    )
    for name, megatron, limit in kinds:
        seconds, gib = zip(
            *(_time_update(make_architecture(depth, **shape), megatron, batch, machine) for depth in depths),
            strict=True,
        )
        layer = (seconds[1] - seconds[0]) / (depths[1] - depths[0])
        yield machine.measured("training", f"update of a 7B layer {name}", 1e3 * layer, "ms")
        mfu = 3 * (many - few) / (seconds[1] - seconds[0]) / PEAK_FLOPS
        yield machine.at_least("training", f"MFU of a layer {name}", mfu, limit)
        memory = (gib[1] - gib[0]) / (depths[1] - depths[0])
        yield machine.measured("training", f"memory of a layer's update {name}", memory, "GiB")


def _time_update(
    arch: Architecture, megatron: dict[str, object], batch: Batch, machine: Machine
) -> tuple[float, float]:
    """Return the seconds of an update, optimizer included, and its memory in GiB beyond weights and optimizer."""
    policy = make_policy(arch, make_config("bfloat16", megatron=megatron), machine)
    update = make_update(policy, batch)
    return machine.wall_seconds(update), machine.peak_bytes(update) / 2**30


def _gradient(arch: Architecture, batch: Batch, config: Config, machine: Machine) -> Tensor:
    """Return the gradient [weights] of one update, in fp32 as Megatron accumulates it."""
    policy = make_policy(arch, config, machine)
    make_update(policy, batch)()
    return torch.cat([buffer.grad_data for chunk in policy.chunks for buffer in chunk.buffers]).clone()


def _weights_after(arch: Architecture, batch: Batch, config: Config, machine: Machine) -> list[Tensor]:
    """Return the weights after three updates."""
    policy = make_policy(arch, config, machine)
    update = make_update(policy, batch)
    for _ in range(3):
        update()
    with policy.readable():
        return [tensor.detach().clone() for _, tensor in policy.named_shards()]


def make_policy(arch: Architecture, config: Config, machine: Machine) -> trained_models.Policy:
    """Return a policy with random weights, the same for the same shape."""
    return trained_models.Policy(arch, config, _reader(arch, machine))


def make_config(dtype: str, offload: bool = False, megatron: dict[str, object] | None = None) -> Config:
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=0)
    model = ModelConfig("", dtype)  # type: ignore[arg-type]
    config = Config(model=model, optimizer=optimizer, offload=offload, loss=LossConfig(kl_coef=0.1))
    return dataclasses.replace(config, megatron=megatron or {})


def make_architecture(layers: int, **shape: int) -> Architecture:
    """Return the architecture of a Qwen2 of this shape."""
    fixed = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_act="silu", rms_norm_eps=1e-6)
    rope = dict(max_position_embeddings=32768, rope_theta=1e6, tie_word_embeddings=False)
    return architecture.read({**fixed, **rope, "num_hidden_layers": layers, **shape})


def _reader(arch: Architecture, machine: Machine) -> Callable[[str], Tensor]:
    """Return a function that draws each tensor of the model's folder, the same for the same name and shape."""
    entries = tensors.entries(arch, 1, 1, 0, "lm")
    shapes = {name: shape for entry in entries for name, shape in tensors.hf_shapes(entry, arch).items()}

    def draw(name: str) -> Tensor:
        if len(shapes[name]) == 1:  # a norm's weights, or biases
            return torch.full(shapes[name], float("norm" in name), device=machine.device)
        return machine.random(*shapes[name], scale=0.02)

    return draw


def make_batch(samples: int, length: int, vocabulary: int) -> Batch:
    """Return one micro-batch of a correct and an incorrect response of this length, with their prompts of 16 tokens."""
    tokens = torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(1)).tolist()
    outcomes = [1.0 if number % 2 == 0 else -1.0 for number in range(samples)]
    chosen = [
        Sample(tuple(row[:16]), tuple(row[16:]), reward, reward) for row, reward in zip(tokens, outcomes, strict=True)
    ]
    return packing.batch(chosen, parallel.packing_spec(samples * length))


def make_update(policy: trained_models.Policy, batch: Batch) -> Callable[[], object]:
    rows = [len(part.labels) for part in batch.micro_batches]
    device = next(policy.chunks[0].parameters()).device
    reference = [torch.full((count,), -6.0, device=device) for count in rows]
    weights = trained_models.TokenWeights([torch.ones(count, device=device) for count in rows])
    return lambda: policy.update(batch, reference, weights)
