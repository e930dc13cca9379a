"""Stage of tools/gpu_acceptance.py: updates of a policy under Megatron, with random weights, on one GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gpu_stages.machine import Machine, Row
from oreal_megatron.algo import packing
from oreal_megatron.config import Config, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from oreal_megatron.mcore import parallel
from oreal_megatron.mcore.trained_models import Policy, TokenRewardModel, TrainedModel
from oreal_megatron.models import architecture, flops, tensors
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.plan import gpus, memory
from oreal_megatron.plan.scenario import Scenario
from oreal_megatron.records import Batch, Sample, TokenWeights

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FUSED_ROTARY = {"apply_rope_fusion": True}
PEAK_FLOPS = 989e12  # dense bf16 of H100 SXM and H200
SMALL = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, vocab_size=512)
QWEN_7B = dict(
    hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064
)


MODELS = {  # with the settings whose bf16 gradients are compared
    "policy": (Policy, (("bf16", {}), ("bf16, fused rotary embedding,", FUSED_ROTARY))),
    "reward model": (TokenRewardModel, (("bf16", {}),)),
}


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
    for model, kinds in MODELS.items():
        exact = _gradient(kinds[0], small, batch, make_config("float32"), machine).double()
        for name, megatron in kinds[1]:
            gradient = _gradient(kinds[0], small, batch, make_config("bfloat16", megatron=megatron), machine).double()
            cosine = torch.nn.functional.cosine_similarity(exact, gradient, 0)
            check = f"{model}: 1 - cosine of {name} and fp32 gradients"
            yield machine.at_most("training", check, 1 - float(cosine), 1e-3)
    scores = [_scores(small, batch, make_config(dtype), machine).double() for dtype in ("float32", "bfloat16")]
    difference = float((scores[0] - scores[1]).abs().mean())
    yield machine.at_most("training", "log-probs of bf16 and fp32, mean difference", difference, 0.01, "nats")
    weights = [
        _weights_after(small, batch, make_config("bfloat16", offload), machine) for offload in (False, False, True)
    ]
    repeated, offloaded = (
        sum(not torch.equal(*pair) for pair in zip(weights[0], other, strict=True)) for other in weights[1:]
    )
    yield machine.at_most("training", "tensors that differ in a second run", repeated, 0)
    yield machine.at_most("training", "tensors that differ with offloading", offloaded, 0)
    yield machine.at_most("training", "bytes that two more updates leave on the GPU with offloading",
                          _leaked_bytes(small, batch, machine), 0, speed=True)  # fmt: skip


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
        config = dataclasses.replace(make_config("bfloat16", megatron=megatron), tokens_per_micro_batch=tokens)
        updates = [_time_update(make_architecture(depth, **shape), config, batch, machine) for depth in depths]
        seconds, layers = updates[1].seconds - updates[0].seconds, depths[1] - depths[0]
        yield machine.measured("training", f"update of a 7B layer {name}", 1e3 * seconds / layers, "ms")
        mfu = 3 * (many - few) / seconds / PEAK_FLOPS
        yield machine.at_least("training", f"MFU of a layer {name}", mfu, limit)
        layer_gib = (updates[1].extra_bytes - updates[0].extra_bytes) / layers / 2**30
        yield machine.measured("training", f"memory of a layer's update {name}", layer_gib, "GiB")
        planned = planned_bytes(make_architecture(depths[1], **shape), config)
        error = updates[1].peak_bytes / planned - 1
        yield machine.at_most("training", f"|error| of the planned {planned / 2**30:.3g} GiB {name}",
                              abs(error), 0.10, speed=True)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class UpdateCost:
    """Cost of one update, optimizer included."""

    seconds: float
    extra_bytes: float  # beyond weights and optimizer
    peak_bytes: float  # of the model, with weights and optimizer


def _time_update(arch: Architecture, config: Config, batch: Batch, machine: Machine) -> UpdateCost:
    before = machine.bytes_in_use()
    update = make_update(make_policy(arch, config, machine), batch)
    seconds = machine.wall_seconds(update)
    standing = machine.bytes_in_use() - before
    extra = machine.peak_bytes(update)
    return UpdateCost(seconds, extra, standing + extra)


def planned_bytes(arch: Architecture, config: Config) -> float:
    """Return what `oreal plan` gives for an update of the policy on one GPU, without the engine and without reserve."""
    engine = dataclasses.replace(config.engine, max_model_len=config.tokens_per_micro_batch)
    data = dataclasses.replace(config.data, prompts_per_step=1)
    config = dataclasses.replace(config, engine=engine, data=data, offload=True)
    phase = memory.stages(Scenario(config, arch, gpus.find_gpu("h200"), world=1))[0].phases["policy"]
    return sum(phase[name] for name in ("parameters", "gradients", "optimizer", "activations", "head"))


def _scores(arch: Architecture, batch: Batch, config: Config, machine: Machine) -> Tensor:
    """Return the log-probs of all tokens."""
    return torch.cat(make_policy(arch, config, machine).score(batch) or [])


def _leaked_bytes(arch: Architecture, batch: Batch, machine: Machine) -> int:
    """Return how much more memory is in use after three updates of an offloaded model than after one."""
    update = make_update(make_policy(arch, make_config("bfloat16", offload=True), machine), batch)
    update()
    first = machine.bytes_in_use()
    for _ in range(2):
        update()
    return machine.bytes_in_use() - first


def _gradient(kind: type[TrainedModel], arch: Architecture, batch: Batch, config: Config, machine: Machine) -> Tensor:
    """Return the gradient [weights] of one update, in fp32 as Megatron accumulates it."""
    model = kind(arch, config, _reader(arch, machine))
    make_update(model, batch)()
    return torch.cat([buffer.grad_data for chunk in model.chunks for buffer in chunk.buffers]).clone()


def _weights_after(arch: Architecture, batch: Batch, config: Config, machine: Machine) -> list[Tensor]:
    """Return the weights after three updates."""
    policy = make_policy(arch, config, machine)
    update = make_update(policy, batch)
    for _ in range(3):
        update()
    with policy.readable():
        return [tensor.detach().clone() for _, tensor in policy.named_shards()]


def make_policy(arch: Architecture, config: Config, machine: Machine) -> Policy:
    """Return a policy with random weights, the same for the same shape."""
    return Policy(arch, config, _reader(arch, machine))


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


def make_update(model: Policy | TokenRewardModel, batch: Batch) -> Callable[[], object]:
    """Return a function that makes one update of a policy or a reward model."""
    if isinstance(model, TokenRewardModel):
        return lambda: model.update(batch)
    rows = [len(part.labels) for part in batch.micro_batches]
    device = next(model.chunks[0].parameters()).device
    reference = [torch.full((count,), -6.0, device=device) for count in rows]
    weights = TokenWeights([torch.ones(count, device=device) for count in rows])
    return lambda: model.update(batch, reference, weights)
