"""Packed attention against one sequence at a time, for whole sequences and for context-parallel shares of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from oreal_megatron.mcore import context_parallel, varlen_attention

LENGTHS = [7, 1, 30, 5, 16, 31, 6]  # 96 tokens
BORDERS = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()


def drawn(groups: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = [(BORDERS[-1], heads, 8) for heads in (4, groups, groups)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k / sqrt d) v over the tokens of the same sequence up to each."""
    each = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    seen = (owner[:, None] == owner) & torch.ones(len(owner), len(owner)).tril().bool()
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", F.softmax(scores.masked_fill(~seen, -torch.inf), -1), value)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_packed_attention_is_that_of_one_sequence_at_a_time(ranks, groups):
    query, key, value = drawn(groups)
    wanted = one_by_one(query, key, value)
    weight = torch.randn_like(wanted)
    gradients = torch.autograd.grad((wanted * weight).sum(), (query, key, value))
    got, rows = [], []
    for rank in range(ranks):
        chunks = context_parallel.chunks(BORDERS[-1], rank, ranks)
        mine = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])
        plan = varlen_attention.AttentionPlan(varlen_attention.segments(BORDERS, chunks), query.device)
        got.append(plan.attend(query[mine], key, value))
        rows.append(mine)
    rows = torch.cat(rows)
    assert rows.sort().values.tolist() == list(range(BORDERS[-1])), "every row on one rank"
    result = torch.cat(got)[rows.argsort()]
    torch.testing.assert_close(result, wanted)
    for got_gradient, gradient in zip(
        torch.autograd.grad((result * weight).sum(), (query, key, value)), gradients, strict=True
    ):
        torch.testing.assert_close(got_gradient, gradient)


def plain_kernel(query, key, value, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa):
    """What torch's varlen_attn promises, segment by segment."""
    assert window_size == (-1, 0) and enable_gqa and len(query) == cu_q[-1] and len(key) == cu_k[-1]
    assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max()) and cu_q.dtype == cu_k.dtype == torch.int32
    done = []
    for segment in range(len(cu_q) - 1):
        q = query[cu_q[segment] : cu_q[segment + 1]]
        k, v = (rows[cu_k[segment] : cu_k[segment + 1]] for rows in (key, value))
        seen = torch.ones(len(q), len(k)).tril(len(k) - len(q)).bool()
        q, k, v = (rows.transpose(0, 1)[None] for rows in (q, k, v))
        done.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(done)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("borders", [BORDERS, [0, 24, 48, 72, 96]], ids=["anywhere", "where shares end"])
def test_borders_for_a_gpu_s_kernel_say_the_same(ranks, borders):
    tensors = drawn()
    for rank in range(ranks):
        chunks = context_parallel.chunks(BORDERS[-1], rank, ranks)
        mine = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])
        plan = varlen_attention.AttentionPlan(varlen_attention.segments(borders, chunks), mine.device)
        share = tensors[0][mine], *tensors[1:]
        torch.testing.assert_close(plan.attend_by_offsets(plain_kernel, *share), plan.attend(*share))


@pytest.mark.parametrize("which", [1, 2], ids=["key", "value"])
def test_nothing_crosses_the_border_of_a_sequence(which):
    tensors = drawn()
    plan = varlen_attention.AttentionPlan(varlen_attention.segments(BORDERS, [range(BORDERS[-1])]), tensors[0].device)
    first, stop = BORDERS[2], BORDERS[3]
    before = plan.attend(*tensors)[first:stop]
    with torch.no_grad():
        tensors[which][:first] += 100.0
        tensors[which][stop:] -= 100.0
    assert torch.equal(plan.attend(*tensors)[first:stop], before)
    with torch.no_grad():
        tensors[which][first] += 1.0
    assert not torch.allclose(plan.attend(*tensors)[first:stop], before)


@pytest.mark.parametrize("ranks", [2, 4])
def test_zigzag_shares_of_one_long_sequence_see_equally_many_keys(ranks):
    rows = 64 * ranks
    seen = [
        sum(sum(segment.offset + place + 1 for place in range(len(segment.queries))) for segment in found)
        for found in (
            varlen_attention.segments((0, rows), context_parallel.chunks(rows, rank, ranks)) for rank in range(ranks)
        )
    ]
    assert max(seen) == min(seen)
