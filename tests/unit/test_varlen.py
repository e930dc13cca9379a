"""Packed attention against one sequence at a time, for whole sequences and for context-parallel shares of them."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def plain_kernel(query, key, value, cu_q, cu_k, max_q, max_k):
    """What torch's varlen_attn promises, segment by segment."""
    assert len(query) == cu_q[-1] and len(key) == cu_k[-1]
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


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...


def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
            window_size=(-1, -1)): ...  # fmt: skip


def of_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
            enable_gqa=False, seqused_k=None, block_table=None, num_splits=None): ...  # fmt: skip


def without_causality(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k): ...


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (of_2_10, {"is_causal": True}),
        (of_2_11, {"window_size": (-1, 0)}),
        (of_2_13, {"window_size": (-1, 0), "enable_gqa": True}),
        (without_causality, None),
        (None, None),
    ],
)
def test_a_release_s_kernel_gets_the_keywords_that_it_has(kernel, options):
    assert varlen_attention.causal_options(kernel) == options
    if options:
        inspect.signature(kernel).bind(*range(7), **options)


def test_the_installed_torch_offers_its_kernel():
    kernel, options = varlen_attention.varlen_attn, varlen_attention._CAUSAL
    assert kernel is not None and options is not None
    inspect.signature(kernel).bind(*range(7), **options)
    shapes = [(BORDERS[-1], heads, 8) for heads in (4, 2, 2)]
    meta = [torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in shapes]
    plan = varlen_attention.AttentionPlan(varlen_attention.segments(BORDERS, [range(96)]), torch.device("meta"))
    assert plan.attend(*meta).shape == shapes[0], "torch's own checks, without a GPU"


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        self.elements = max([self.elements, *(one.numel() for one in tensors)])
        return result


@pytest.mark.parametrize("ranks", [1, 4])
def test_memory_without_a_gpu_s_kernel_is_linear_in_the_length(ranks):
    """The last share under context parallelism: queries that see all keys before them."""

    def largest(rows: int) -> int:
        chunks = context_parallel.chunks(rows, 0, ranks)
        plan = varlen_attention.AttentionPlan(varlen_attention.segments([0, rows], chunks), torch.device("cpu"))
        own = sum(map(len, chunks))
        shapes = (own, 2, 4), (rows, 1, 4), (rows, 1, 4)
        query, key, value = (torch.ones(shape, requires_grad=True) for shape in shapes)
        with LargestTensor() as seen:
            plan.attend(query, key, value).sum().backward()
        return seen.elements

    assert largest(2048) <= 2.1 * largest(1024)


def test_a_gpu_that_pads_says_so_once_on_the_first_rank(monkeypatch, caplog):
    varlen_attention._report_fallback.cache_clear()
    for _ in range(3):
        varlen_attention._report_fallback(torch.float32)
    monkeypatch.setattr(varlen_attention.distributed, "rank", lambda: 1)
    varlen_attention._report_fallback(torch.float64)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "pads sequences (float32" in said
    varlen_attention._report_fallback.cache_clear()


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
