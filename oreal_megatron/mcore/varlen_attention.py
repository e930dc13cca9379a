"""Causal attention over sequences packed end to end: none looks into another, memory grows linearly with length.

Plain torch. On GPUs, in half precision, torch's variable-length flash attention; elsewhere sequences of about the same
length are padded to one batch for scaled_dot_product_attention, so that short ones cost no call each.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None


@dataclass(frozen=True)
class Segment:
    """Consecutive queries of one sequence, and its keys from its first one to that of the last query."""

    queries: range  # rows of this rank's queries
    keys: range  # rows of the keys of all ranks

    @property
    def offset(self) -> int:
        """How many tokens of the sequence come before the first query."""
        return len(self.keys) - len(self.queries)


def segments(borders: Sequence[int], chunks: Sequence[range]) -> tuple[Segment, ...]:
    """What attends to what, when this rank's queries are the rows of `chunks`, laid end to end.

    borders: [B+1] of the sequences, from 0. Without context parallelism there is one chunk, all rows.
    """
    found, first = [], 0
    for chunk in chunks:
        for start, stop in itertools.pairwise(borders):
            low, high = max(start, chunk.start), min(stop, chunk.stop)
            if low < high:
                query = first + low - chunk.start
                found.append(Segment(range(query, query + high - low), range(start, high)))
        first += len(chunk)
    return tuple(found)


@dataclass(frozen=True)
class AttentionPlan:
    """The segments of one micro-batch as index tensors, made once for all layers."""

    segments: tuple[Segment, ...]
    device: torch.device

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[S, heads, d] from queries [S, heads, d], keys and values [S', groups, d]; heads is a multiple of groups."""
        half = query.dtype in (torch.bfloat16, torch.float16)
        if (query.is_meta or (query.is_cuda and half)) and _has_varlen():  # rehearsals take the GPU's way
            return self.by_borders(varlen_attn, query, key, value)
        attended = torch.cat([batch.attend(query, key, value) for batch in self._batches])
        return attended.index_select(0, self._places)

    def by_borders(self, kernel: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`attend` by a kernel that takes borders, and whose causal mask is aligned to the last key of each segment."""
        return kernel(query, key[self._key_rows], value[self._key_rows], *self.borders, **_CAUSAL)

    @cached_property
    def _batches(self) -> list[_Batch]:
        return [_Batch.of(group, self.device) for group in _alike(self.segments)]

    @cached_property
    def _places(self) -> Tensor:
        """[S] where each query lies when the batches are laid end to end."""
        return torch.cat([batch.queries[batch.real] for batch in self._batches]).argsort()

    @cached_property
    def _key_rows(self) -> Tensor | slice:
        """Every segment's keys end to end; a slice where they lie so already."""
        ranges = [segment.keys for segment in self.segments]
        if all(before.stop == after.start for before, after in itertools.pairwise(ranges)):
            return slice(ranges[0].start, ranges[-1].stop)
        return torch.cat([torch.arange(keys.start, keys.stop) for keys in ranges]).to(self.device)

    @cached_property
    def borders(self) -> tuple[Tensor, Tensor, int, int]:
        """Of queries and of keys: [segments + 1] int32 where they begin and end, and the longest."""
        queries = [len(segment.queries) for segment in self.segments]
        keys = [len(segment.keys) for segment in self.segments]
        sums = (torch.tensor([0, *column]).cumsum(0).int().to(self.device) for column in (queries, keys))
        return *sums, max(queries), max(keys)


@dataclass(frozen=True)
class _Batch:
    """Segments padded on the right to one length. Causal attention never looks right, so padding needs no mask."""

    queries: Tensor  # [N, Q] rows
    keys: Tensor  # [N, K] rows
    real: Tensor  # [N, Q] bool, False where padded
    mask: Tensor | None  # [Q, K] bool, True where a query sees a key; None: plainly causal

    @classmethod
    def of(cls, group: list[Segment], device: torch.device) -> _Batch:
        queries, real = _rows([segment.queries for segment in group])
        keys, _ = _rows([segment.keys for segment in group])
        offset = group[0].offset
        mask = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).tril(offset) if offset else None
        return cls(queries.to(device), keys.to(device), real.to(device), mask if mask is None else mask.to(device))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[sum of real, heads, d]."""
        q, k, v = _padded(query, self.queries), _padded(key, self.keys), _padded(value, self.keys)
        causal = dict(is_causal=True) if self.mask is None else dict(attn_mask=self.mask)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **causal).transpose(1, 2)[self.real]


def _padded(rows: Tensor, index: Tensor) -> Tensor:
    """[N, heads, L, d] from rows [S, heads, d] and their numbers [N, L]."""
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _alike(found: Sequence[Segment]) -> list[list[Segment]]:
    """Whole sequences grouped by the power of two below their length; each part of one stands alone."""
    groups: dict[tuple, list[Segment]] = {}
    for segment in found:
        kind = ("part", segment.queries.start) if segment.offset else ("whole", len(segment.queries).bit_length())
        groups.setdefault(kind, []).append(segment)
    return list(groups.values())


def _rows(ranges: list[range]) -> tuple[Tensor, Tensor]:
    """[N, longest] row numbers, beyond each range its last one again; and where they are real."""
    first = torch.tensor([one.start for one in ranges])[:, None]
    length = torch.tensor([len(one) for one in ranges])[:, None]
    place = torch.arange(max(len(one) for one in ranges))
    return first + torch.minimum(place, length - 1), place < length


_CAUSAL = dict(window_size=(-1, 0), enable_gqa=True)


def _has_varlen() -> bool:
    return varlen_attn is not None and _CAUSAL.keys() <= inspect.signature(varlen_attn).parameters.keys()
