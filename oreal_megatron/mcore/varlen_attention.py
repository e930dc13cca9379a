"""Causal attention over sequences packed end to end, separate for each sequence; memory is linear in the length.

Plain torch. On GPUs, in half precision, torch's variable-length flash attention; elsewhere sequences of about the same
length are padded to one batch for scaled_dot_product_attention, so that short ones do not cost a call each. A part of a
sequence gets empty queries in front, which makes it a whole one: no path builds a mask or a matrix of scores.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.attention as torch_attention
import torch.nn.functional as F
from torch import Tensor

from oreal_megatron.runtime import distributed

log = logging.getLogger(__name__)

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None


def causal_options(kernel: Callable[..., Any] | None) -> dict[str, Any] | None:
    """Return the keywords that make a release's varlen_attn causal; None if it cannot be.

    torch 2.10 has `is_causal`, 2.11 `window_size`, 2.13 also `enable_gqa`, without which it refuses fewer key heads;
    releases before take them as they are.
    """
    known = inspect.signature(kernel).parameters if kernel else {}
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if not causal.keys() <= known.keys():
        return None
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


_CAUSAL = causal_options(varlen_attn)


@dataclass(frozen=True)
class Segment:
    """Consecutive queries of one sequence, and its keys from the first one to that of the last query."""

    queries: range  # rows of this rank's queries
    keys: range  # rows of the keys of all ranks

    @property
    def offset(self) -> int:
        """Number of tokens of the sequence before the first query."""
        return len(self.keys) - len(self.queries)


def segments(sequence_offsets: Sequence[int], chunks: Sequence[range]) -> tuple[Segment, ...]:
    """Return the segments of a rank whose queries are the rows of `chunks`, laid end to end.

    `sequence_offsets` is [B+1], from 0. Without context parallelism there is one chunk, all rows.
    """
    result, first = [], 0
    for chunk in chunks:
        for start, stop in itertools.pairwise(sequence_offsets):
            low, high = max(start, chunk.start), min(stop, chunk.stop)
            if low < high:
                query = first + low - chunk.start
                result.append(Segment(range(query, query + high - low), range(start, high)))
        first += len(chunk)
    return tuple(result)


@dataclass(frozen=True)
class AttentionPlan:
    """The segments of one micro-batch as index tensors, made once for all layers."""

    segments: tuple[Segment, ...]
    device: torch.device

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [S, heads, d] from queries [S, heads, d], keys and values [S', groups, d]; groups divides heads."""
        is_half = query.dtype in (torch.bfloat16, torch.float16)
        # Rehearsals on the meta device follow the GPU's path.
        if varlen_attn is not None and _CAUSAL is not None and (query.is_meta or (query.is_cuda and is_half)):
            use_fastest_kernel(query.device)
            return self.attend_by_offsets(functools.partial(varlen_attn, **_CAUSAL), query, key, value)
        if query.is_cuda:
            _report_fallback(query.dtype)
        attended = torch.cat([batch.attend(query, key, value) for batch in self._batches])
        return attended.index_select(0, self._query_order)

    def attend_by_offsets(self, kernel: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute `attend` by a kernel that takes offsets and aligns its causal mask to the last key of a segment."""
        return kernel(query, key[self._key_rows], value[self._key_rows], *self.offsets)

    @cached_property
    def _batches(self) -> list[_PaddedSegments]:
        return [_PaddedSegments.from_segments(group, self.device) for group in _similar_lengths(self.segments)]

    @cached_property
    def _query_order(self) -> Tensor:
        """[S] position of each query when the batches are laid end to end."""
        return torch.cat([batch.queries[batch.valid] for batch in self._batches]).argsort()

    @cached_property
    def _key_rows(self) -> Tensor | slice:
        """Rows of every segment's keys, end to end; a slice where they are consecutive already."""
        ranges = [segment.keys for segment in self.segments]
        if all(before.stop == after.start for before, after in itertools.pairwise(ranges)):
            return slice(ranges[0].start, ranges[-1].stop)
        return torch.cat([torch.arange(keys.start, keys.stop) for keys in ranges]).to(self.device)

    @cached_property
    def offsets(self) -> tuple[Tensor, Tensor, int, int]:
        """Cumulative lengths [segments + 1] int32 of queries and of keys, and the longest of each."""
        queries = [len(segment.queries) for segment in self.segments]
        keys = [len(segment.keys) for segment in self.segments]
        return self._cumulative(queries), self._cumulative(keys), max(queries), max(keys)

    def _cumulative(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).int().to(self.device)


@dataclass(frozen=True)
class _PaddedSegments:
    """Segments padded on the right to one length. Causal attention never looks right, so padding needs no mask."""

    queries: Tensor  # [N, Q] rows
    keys: Tensor  # [N, offset + Q] rows
    valid: Tensor  # [N, Q] bool, False where padded
    offset: int  # keys before the first query

    @classmethod
    def from_segments(cls, group: list[Segment], device: torch.device) -> _PaddedSegments:
        queries, valid = _padded_rows([segment.queries for segment in group])
        keys, _ = _padded_rows([segment.keys for segment in group])
        return cls(queries.to(device), keys.to(device), valid.to(device), group[0].offset)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [sum of valid, heads, d]."""
        q, k, v = _select(query, self.queries), _select(key, self.keys), _select(value, self.keys)
        q = F.pad(q, (0, 0, self.offset, 0))  # a causal kernel without a mask aligns the first query with the first key
        if q.is_cuda:
            attended = _attend_on_gpu(q, k, v)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)
        return attended[:, :, self.offset :].transpose(1, 2)[self.valid]


def _attend_on_gpu(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return causal attention by a kernel of linear memory, never torch's plain products.

    The kernel for float32 takes no grouped heads; with them torch would choose the plain products.
    """
    each = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
    linear = [torch_attention.SDPBackend.FLASH_ATTENTION, torch_attention.SDPBackend.EFFICIENT_ATTENTION]
    with torch_attention.sdpa_kernel(linear):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def _select(rows: Tensor, index: Tensor) -> Tensor:
    """Return [N, heads, L, d] from rows [S, heads, d] and their numbers [N, L]."""
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _similar_lengths(all_segments: Sequence[Segment]) -> list[list[Segment]]:
    """Group complete sequences by the power of two below their length; a part of a sequence is a group of its own."""
    groups: dict[tuple[str, int], list[Segment]] = {}
    for segment in all_segments:
        length = len(segment.queries).bit_length()
        kind = ("part", segment.queries.start) if segment.offset else ("complete", length)
        groups.setdefault(kind, []).append(segment)
    return list(groups.values())


def _padded_rows(ranges: list[range]) -> tuple[Tensor, Tensor]:
    """Return [N, longest] row numbers, each range padded with its last one, and a mask of the valid ones."""
    first = torch.tensor([rows.start for rows in ranges])[:, None]
    length = torch.tensor([len(rows) for rows in ranges])[:, None]
    position = torch.arange(max(len(rows) for rows in ranges))
    return first + torch.minimum(position, length - 1), position < length


@functools.cache
def use_fastest_kernel(device: torch.device) -> str | None:
    """Let torch's flash attention use FlashAttention 3 on Hopper where its package is installed; return its name.

    The package is `flash_attn_interface`. torch's own kernel, FlashAttention 2, is used everywhere else.
    """
    offers = getattr(torch_attention, "list_flash_attention_impls", list)
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if not is_hopper or "FA3" not in offers() or importlib.util.find_spec("flash_attn_interface") is None:
        return None
    try:
        torch_attention.activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError) as error:
        log.warning("FlashAttention 3 is installed but cannot be used (%s); FlashAttention 2 is used", error)
        return None
    return "FA3"


@functools.cache
def _report_fallback(dtype: torch.dtype) -> None:
    """Report once that a GPU does not use variable-length flash attention."""
    if distributed.rank():
        return
    log.warning(
        "attention on this GPU pads sequences (%s, torch %s), which may take twice the time: torch's variable-length "
        "flash attention needs bfloat16 or float16, and torch 2.10 or newer",
        str(dtype).removeprefix("torch."),
        torch.__version__,
    )
