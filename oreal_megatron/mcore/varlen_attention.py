"""Causal attention over sequences packed end to end, separate for each sequence; memory is linear in the length.

Plain torch. On GPUs, in half precision, torch's variable-length flash attention; elsewhere sequences of about the same
length are padded to one batch for scaled_dot_product_attention, so that short ones do not cost a call each.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None


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
        if varlen_attn is not None and (query.is_meta or (query.is_cuda and is_half)) and _varlen_has_options():
            return self.attend_by_offsets(varlen_attn, query, key, value)
        attended = torch.cat([batch.attend(query, key, value) for batch in self._batches])
        return attended.index_select(0, self._query_order)

    def attend_by_offsets(self, kernel: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute `attend` by a kernel that takes offsets and aligns its causal mask to the last key of a segment."""
        return kernel(query, key[self._key_rows], value[self._key_rows], *self.offsets, **_CAUSAL)

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
    keys: Tensor  # [N, K] rows
    valid: Tensor  # [N, Q] bool, False where padded
    mask: Tensor | None  # [Q, K] bool, True where a query attends to a key; None: plainly causal

    @classmethod
    def from_segments(cls, group: list[Segment], device: torch.device) -> _PaddedSegments:
        queries, valid = _padded_rows([segment.queries for segment in group])
        keys, _ = _padded_rows([segment.keys for segment in group])
        offset = group[0].offset
        mask = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).tril(offset) if offset else None
        return cls(queries.to(device), keys.to(device), valid.to(device), mask if mask is None else mask.to(device))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [sum of valid, heads, d]."""
        q, k, v = _select(query, self.queries), _select(key, self.keys), _select(value, self.keys)
        if self.mask is None:
            attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, attn_mask=self.mask)
        return attended.transpose(1, 2)[self.valid]


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


_CAUSAL = dict(window_size=(-1, 0), enable_gqa=True)


def _varlen_has_options() -> bool:
    """Check the signature: the keywords of varlen_attn differ between torch releases."""
    return varlen_attn is not None and _CAUSAL.keys() <= inspect.signature(varlen_attn).parameters.keys()
