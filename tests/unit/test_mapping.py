"""Hugging Face -> Megatron shards -> Hugging Face, with a different integer in every element: any swap shows."""

from __future__ import annotations

import itertools

import pytest
import torch

from oreal_megatron.mapping import tensors
from oreal_megatron.mapping.architecture import Architecture


def arch(tied: bool = False) -> Architecture:
    return Architecture("qwen2", 4, 16, 24, 4, 2, 4, vocab=100, max_positions=64, rope_theta=1e4, norm_epsilon=1e-6,
                        tied=tied, qkv_bias=True)  # fmt: skip


def hf_weights(a: Architecture) -> dict[str, torch.Tensor]:
    """Every tensor the entries name, filled with unique integers (exact in float64)."""
    count = itertools.count()
    queries, keys = a.heads * a.head_dim, a.kv_groups * a.head_dim
    shapes = {"model.embed_tokens.weight": (a.vocab, a.hidden), "model.norm.weight": (a.hidden,)}
    if not a.tied:
        shapes["lm_head.weight"] = (a.vocab, a.hidden)
    for layer in range(a.layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[at + f"self_attn.{name}_proj.weight"] = (rows, a.hidden)
            shapes[at + f"self_attn.{name}_proj.bias"] = (rows,)
        shapes[at + "self_attn.o_proj.weight"] = (a.hidden, queries)
        shapes[at + "mlp.gate_proj.weight"] = shapes[at + "mlp.up_proj.weight"] = (a.ffn, a.hidden)
        shapes[at + "mlp.down_proj.weight"] = (a.hidden, a.ffn)
        shapes[at + "input_layernorm.weight"] = shapes[at + "post_attention_layernorm.weight"] = (a.hidden,)

    def fill(shape: tuple[int, ...]) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return torch.tensor([next(count) for _ in range(size)], dtype=torch.float64).view(shape)

    return {name: fill(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tensor", "stages"), [(1, 1), (2, 1), (1, 2), (2, 2), (2, 4)])
def test_the_round_trip_is_exact_at_every_layout(tied, tensor, stages):
    a = arch(tied)
    weights, back = hf_weights(a), {}
    for stage in range(stages):
        for entry in tensors.entries(a, tensor, stages, stage, "lm"):
            full = tensors.to_megatron(entry, a, weights.__getitem__)
            assert full.shape == torch.Size(entry.shape), entry
            shards = [tensors.shard(entry, full, rank, tensor) for rank in range(tensor)]
            assert all(shard.shape == entry.shard_shape(tensor) for shard in shards), entry
            if entry.exported:
                for name, value in tensors.to_hf(entry, a, tensors.unshard(entry, shards)).items():
                    assert name not in back, f"{name} is exported twice"
                    back[name] = value
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())


def test_a_rank_holds_whole_query_groups_and_matching_gate_and_up_rows():
    a, weights = arch(), hf_weights(arch())
    by_name = {entry.megatron: entry for entry in tensors.entries(a, 2, 1, 0, "lm")}
    qkv = by_name["decoder.layers.1.self_attention.linear_qkv.weight"]
    second = tensors.shard(qkv, tensors.to_megatron(qkv, a, weights.__getitem__), 1, 2)
    q, k, v = (weights[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    assert torch.equal(second, torch.cat([q[8:], k[4:], v[4:]]))  # group 1: two query heads of 4, its key, its value
    fc1 = by_name["decoder.layers.1.mlp.linear_fc1.weight"]
    first = tensors.shard(fc1, tensors.to_megatron(fc1, a, weights.__getitem__), 0, 2)
    gate, up = (weights[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(first, torch.cat([gate[:12], up[:12]]))


def test_vocabulary_is_padded_for_every_rank_alike_and_padding_never_leaves():
    a, weights = arch(), hf_weights(arch())
    assert [a.padded_vocab(tensor) for tensor in (1, 2, 4)] == [128, 128, 256]
    entry = next(tensors.entries(a, 2, 1, 0, "lm"))
    full = tensors.to_megatron(entry, a, weights.__getitem__)
    assert full.shape[0] == 128 and not full[100:].any()
    assert tensors.to_hf(entry, a, full)["model.embed_tokens.weight"].shape[0] == 100


def test_the_last_stage_of_a_tied_model_is_filled_but_not_exported():
    last = list(tensors.entries(arch(tied=True), 1, 2, 1, "lm"))[-1]
    assert last.hf == ("model.embed_tokens.weight",) and not last.exported


def test_the_reward_model_has_a_scalar_head_even_when_the_policy_is_tied():
    for tied in (True, False):
        heads = [e for e in tensors.entries(arch(tied), 2, 1, 0, "scalar") if e.megatron == "output_layer.weight"]
        assert [(e.hf, e.shape, e.cut) for e in heads] == [(("score.weight",), (1, 16), tensors.Cut.WHOLE)]
