"""Paths that only a GPU takes, by the calls they make: process group, fused operations, the kernel for Hopper."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings import rope_utils
from repository import ROOT

from oreal_megatron import config as c
from oreal_megatron.mcore import gpt_model, layers, parallel, varlen_attention
from oreal_megatron.models import architecture

FAMILIES = json.loads((ROOT / "tests/families.json").read_text())


@pytest.fixture
def gpu(monkeypatch):
    """A machine on which torch reports Hopper GPUs, and the calls that would reach them."""
    calls = SimpleNamespace(device=None, group={})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(calls, "device", device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: calls.group.update(options, b=backend))
    monkeypatch.setattr(parallel, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 3, 8)]))
    for key, value in {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "3",
        "MASTER_PORT": "29400",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        monkeypatch.setenv(key, value)
    return calls


def test_the_process_group_connects_on_the_rank_s_own_gpu_at_the_start(gpu):
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    parallel.start_process_group()
    assert gpu.device == gpu.group["device_id"] == torch.device("cuda", 3) and gpu.group["b"] == "cpu:gloo,cuda:nccl"
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False


def test_on_cpus_no_device_is_bound(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parallel.start_process_group()
    assert gpu.group["device_id"] is None and gpu.group["b"] == "gloo" and gpu.device is None


@pytest.mark.parametrize(("family", "fused"), [("Qwen2", True), ("Qwen3Moe", False)])
def test_swiglu_is_fused_on_gpus_unless_the_recipe_says_otherwise(family, fused, monkeypatch):
    """Not of experts, whose fused path weighs tokens as well."""
    arch = architecture.read(FAMILIES[family])
    assert not gpt_model.transformer_config(arch, c.Config()).bias_activation_fusion
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpt_model._fusions(arch)["bias_activation_fusion"] is fused
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    allowed = c.Config(megatron={"bias_activation_fusion": True})
    assert gpt_model.transformer_config(arch, allowed).bias_activation_fusion


def test_rotary_embedding_is_fused_for_local_layers_where_the_recipe_says_so(monkeypatch):
    """Transformer Engine's layers leave Megatron's function in place, which reads angles."""
    arch, fused = architecture.read(FAMILIES["Qwen2"]), c.Config(megatron={"apply_rope_fusion": True})
    transformer_engine = c.Config(model=c.ModelConfig(layers="transformer_engine"))
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", None)
    assert not gpt_model.transformer_config(arch, transformer_engine).apply_rope_fusion
    assert rope_utils.fused_apply_rotary_pos_emb is None
    assert not gpt_model.transformer_config(arch, c.Config()).apply_rope_fusion, "no GPU has run it"
    assert gpt_model.transformer_config(arch, fused).apply_rope_fusion
    assert rope_utils.fused_apply_rotary_pos_emb is layers.fused_rotary


def test_fused_rotary_embedding_equals_megatrons():
    """Angles of positions up to 16384, queries as a slice of the projection; only roundings differ."""
    generator = torch.Generator().manual_seed(0)
    frequencies = 1 / 10_000 ** (torch.arange(0, 8) / 8)
    positions = torch.randint(0, 16_384, (40,), generator=generator)
    query = torch.randn(40, 1, 6, 24, generator=generator)[..., :16]
    angles, cos_sin = (layers.PackedRotary(frequencies, fused)(positions) for fused in (False, True))
    expected = rope_utils._apply_rotary_pos_emb_bshd(query, angles)
    torch.testing.assert_close(layers.fused_rotary(query, cos_sin), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="interleaved=True"):
        layers.fused_rotary(query, cos_sin, interleaved=True)


@pytest.mark.parametrize(
    ("offers", "package", "capability", "used"),
    [
        (["FA3", "FA4"], True, (9, 0), "FA3"),
        (["FA3", "FA4"], False, (9, 0), None),
        (["FA4"], True, (9, 0), None),
        (["FA3"], True, (8, 0), None),
        (["FA3"], True, (10, 0), None),
    ],
)
def test_flash_attention_3_is_used_where_torch_package_and_gpu_have_it(
    offers, package, capability, used, gpu, monkeypatch
):
    activated: list[str] = []
    monkeypatch.setattr(varlen_attention.torch_attention, "list_flash_attention_impls", lambda: offers)
    monkeypatch.setattr(varlen_attention.torch_attention, "activate_flash_attention_impl", activated.append)
    monkeypatch.setattr(varlen_attention.importlib.util, "find_spec", lambda name: object() if package else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for _ in range(2):
        assert varlen_attention.use_fastest_kernel.__wrapped__(torch.device("cuda", 0)) == used
    assert activated == ([used] * 2 if used else [])


def test_a_broken_flash_attention_3_leaves_version_2_and_a_warning(gpu, monkeypatch, caplog):
    def fail(name: str) -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(varlen_attention.torch_attention, "activate_flash_attention_impl", fail)
    monkeypatch.setattr(varlen_attention.importlib.util, "find_spec", lambda name: object())
    assert varlen_attention.use_fastest_kernel.__wrapped__(torch.device("cuda", 0)) is None
    assert "undefined symbol" in caplog.text


@pytest.mark.parametrize(
    "chunks", [[range(13)], [range(2, 4), range(7, 10)]], ids=["all queries", "parts of sequences"]
)
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (6, 1)])
def test_without_variable_lengths_a_gpu_attends_by_kernels_of_linear_memory(chunks, heads, groups, monkeypatch):
    """Float32, for one. torch's plain products hold all scores; it would choose them for grouped heads or a mask."""
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def record(query, key, value, **options):
        calls.append((query.shape[1] == key.shape[1], torch.backends.cuda.math_sdp_enabled(), options))
        return attention(query, key, value, **options)

    plan = varlen_attention.AttentionPlan(varlen_attention.segments([0, 5, 12, 13], chunks), torch.device("cpu"))
    query = torch.randn(sum(map(len, chunks)), heads, 8)
    key, value = torch.randn(2, 13, groups, 8)
    expected = plan.attend(query, key, value)
    monkeypatch.setattr(varlen_attention.F, "scaled_dot_product_attention", record)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    attended = plan.attend(query, key, value)
    torch.testing.assert_close(attended, expected)
    assert calls and all(call == (True, False, {"is_causal": True}) for call in calls)
