"""Parts that the fused heads share: one rank's shard of the vocabulary, and the passes over a chunk of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_kernels import chunk_plan, collective, gemm, input_checks
from oreal_kernels.combine import Combined, combine
from oreal_kernels.row_gradient import row_gradient
from oreal_kernels.row_statistics import row_statistics

IGNORE_LABEL = -100  # label of a row that does not count; torch's ignore_index
BUDGET_BYTES = 1280 * 2**20  # default budget for logits; model.logits_mib has the same


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Part of the vocabulary that this rank's rows of the output layer hold."""

    start: int  # first token id
    columns: int  # rows of the weight that belong to the vocabulary; further rows are padding
    vocabulary: int  # tokens over all ranks, without padding

    @classmethod
    def of_rank(
        cls, width: int, vocab_size: int | None, start: int | None, group: dist.ProcessGroup | None
    ) -> VocabShard:
        """Return the shard of a rank that holds `width` rows; shards are equal, in rank order, unless `start` is given.

        Raises ValueError for a start without the vocabulary's size.
        """
        if start is not None and vocab_size is None:
            raise ValueError("vocab_start is given, so shards may differ; give vocab_size too, which all ranks know")
        if start is None:
            start = 0 if group is None else group.rank() * width
        vocabulary = collective.size(group) * width if vocab_size is None else vocab_size
        return cls(start, min(max(vocabulary - start, 0), width), vocabulary)

    def head(
        self,
        weight: Tensor,
        labels: Tensor,
        temperature: float | Tensor,
        softcap: float,
        group: dist.ProcessGroup | None,
        logits_dtype: torch.dtype,
    ) -> VocabHead:
        """Return the head over this shard for rows with these labels [N]."""
        scale = inverse_temperatures(temperature, len(labels), weight.device)
        label_column = self.label_column(labels)
        return VocabHead(
            weight.detach(), self.vocabulary, label_column, scale, float(softcap), self.columns, group, logits_dtype
        )

    def label_column(self, labels: Tensor) -> Tensor:
        """Return the column [N] of each label in this shard, or a number outside of [0, columns)."""
        valid = (labels == IGNORE_LABEL) | ((labels >= 0) & (labels < self.vocabulary))
        # No host synchronisation: on a GPU the error shows at a later call.
        torch._assert_async(
            valid.all(), f"a label is neither {IGNORE_LABEL} nor within the vocabulary of {self.vocabulary} tokens"
        )
        return torch.where(labels == IGNORE_LABEL, -1, labels - self.start)


@dataclass(frozen=True, slots=True)
class VocabHead:
    """A shard of the output layer and the labels of N rows; `rows` below is a chunk of them."""

    weight: Tensor  # [V', H] of this rank
    vocabulary: int  # tokens over all ranks
    label_column: Tensor  # [N]
    inverse_temperature: Tensor  # [N] fp32
    softcap: float
    columns: int
    group: dist.ProcessGroup | None
    logits_dtype: torch.dtype

    def plan(self, mode: str, budget_bytes: int) -> chunk_plan.ChunkPlan:
        """Return the chunk plan, which is the same on all ranks: they must exchange the same chunks."""
        share = -(-self.vocabulary // collective.size(self.group))  # not this rank's columns, which may differ
        sizes = {self.logits_dtype: self.logits_dtype.itemsize, self.weight.dtype: self.weight.dtype.itemsize}
        row_bytes = share * sum(sizes.values())  # logits, and gradients where those are of another dtype
        speed, hidden = chunk_plan.device_speed(self.weight.device), self.weight.shape[1]
        return chunk_plan.choose(len(self.label_column), hidden, share, row_bytes, budget_bytes, mode, speed)

    def logits(self, x: Tensor, rows: slice, buffer: Tensor | None = None) -> Tensor:
        """Return logits [n, V'], in the buffer of an earlier chunk when given."""
        x = x[rows]
        if buffer is None:
            buffer = torch.empty(len(x), len(self.weight), dtype=self.logits_dtype, device=x.device)
        return gemm.logits(x, self.weight, buffer[: len(x)])

    def statistics(self, logits: Tensor, rows: slice) -> Tensor:
        """Return the statistics [4, n] of this rank's logits."""
        scale = self.inverse_temperature[rows]
        return row_statistics(logits, self.label_column[rows], scale, self.softcap, self.columns)

    def combine_ranks(self, local: Tensor) -> Combined:
        """Gather the statistics [4, n] of all ranks and merge them. Collective."""
        return combine(collective.gather_statistics(local, self.group))

    def dlogits(
        self, logits: Tensor, rows: slice, combined: Combined, a: Tensor, b: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Return d loss / d logits [n, V'] in `dtype`, written over the logits when that is theirs.

        `a` and `b` [n] are the gradients of the log-probs and the entropies; `b` None: the entropies have none.
        """
        out = logits if logits.dtype is dtype else torch.empty_like(logits, dtype=dtype)
        label, scale = self.label_column[rows], self.inverse_temperature[rows]
        per_row = (combined.statistics[0], combined.log_total, combined.entropy, a, b)
        row_gradient(logits, out, label, scale, self.softcap, self.columns, *per_row)
        return out


def row_chunks(rows: int, chunk_rows: int) -> Iterator[slice]:
    """Yield slices of at most `chunk_rows` rows."""
    for first in range(0, rows, chunk_rows):
        yield slice(first, min(first + chunk_rows, rows))


def inverse_temperatures(temperature: float | Tensor, rows: int, device: torch.device) -> Tensor:
    """Return 1 / temperature as [rows] fp32, from one number or one per row.

    Raises ValueError for a temperature that is not a finite number above 0 (in a tensor on a GPU at a later call).
    """
    if isinstance(temperature, Tensor):
        if temperature.shape not in ((), (1,), (rows,)):
            raise ValueError(f"temperature has shape {list(temperature.shape)}; expected one number or [{rows}]")
        positive = ((temperature > 0) & temperature.isfinite()).all()
        input_checks.require(positive, "a temperature is not above 0 and finite; the logits are divided by it")
        return temperature.to(device, torch.float64).reciprocal().float().expand(rows).contiguous()
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a number above 0, which the logits are divided by")
    return torch.full((rows,), 1 / temperature, dtype=torch.float32, device=device)


def check_labels(labels: Tensor) -> Tensor:
    """Return the labels as int64; TypeError where they are not integers."""
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype is torch.bool:
        raise TypeError(f"labels are {labels.dtype}; expected integers, token ids or {IGNORE_LABEL}")
    return labels.long()


def check_inputs(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, ranks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a head's inputs, contiguous, labels as int64.

    Raises ValueError where shapes do not fit, TypeError where dtypes do not.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}; expected [rows, H] and [vocabulary, H]"
        )
    if hidden.dtype is not weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}; convert one of them with .to()")
    expected = len(hidden) * ranks if rows is None else len(rows)
    if labels.dim() != 1 or len(labels) != expected:
        unit = "rows of hidden" if rows is None else "entries of rows"
        raise ValueError(
            f"labels are {list(labels.shape)} for {expected} {unit}; each needs a label, or {IGNORE_LABEL}"
        )
    return hidden.contiguous(), weight.contiguous(), check_labels(labels)


def gather_inputs(hidden: Tensor, rows: Tensor | None, gather_over: dist.ProcessGroup | None) -> Tensor:
    """Return the rows [N, H] that have a label, out of the full sequence, which is gathered over the group if given."""
    if gather_over is not None and gather_over.size() > 1:
        hidden = collective.gather_rows(hidden, gather_over)
    return hidden if rows is None else hidden.index_select(0, rows)


class InputGradient:
    """Gradient of `hidden`, chunk by chunk; sums over tensor-parallel ranks run beside the weight's product."""

    def __init__(self, x: Tensor, head: VocabHead, sequence_parallel: bool):
        self.total, self.weight, self.group = torch.empty_like(x), head.weight, head.group
        self.scatter_group = head.group if sequence_parallel and collective.size(head.group) > 1 else None
        self.works: list[dist.Work | None] = []

    def add(self, dlogits: Tensor, rows: slice) -> None:
        """Compute the gradient of a chunk of rows and start its sum over the ranks."""
        torch.mm(dlogits, self.weight, out=self.total[rows])
        if self.scatter_group is None:
            self.works.append(collective.start_all_reduce(self.total[rows], self.group))

    def result(self, rows: Tensor | None, hidden: Tensor) -> Tensor:
        """Return the gradient in the shape of `hidden`, zero in rows without a label."""
        for work in self.works:
            if work is not None:
                work.wait()
        full = self.total
        if rows is not None:
            ranks = 1 if self.scatter_group is None else self.scatter_group.size()
            full = full.new_zeros(ranks * len(hidden), hidden.shape[1]).index_copy_(0, rows, full)
        return full if self.scatter_group is None else collective.reduce_scatter_rows(full, self.scatter_group)


class WeightGradient:
    """Gradient of `weight`, summed over chunks in fp32: in `main_grad` when given, else in a buffer of its own."""

    def __init__(self, weight: Tensor, main_grad: Tensor | None):
        self.weight, self.main_grad = weight, main_grad
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.total = torch.zeros_like(weight, dtype=wide) if main_grad is None else main_grad

    def add(self, dlogits: Tensor, x: Tensor) -> None:
        """Add the gradient of a chunk of rows."""
        gemm.add_weight_gradient(dlogits, x, self.total)

    def result(self, main_grad: Tensor | None = None, scale: Tensor | None = None) -> Tensor | None:
        """Return the tensor for autograd: the gradient, or Megatron's placeholder when main_grad holds the gradient.

        A sum in a buffer of its own is multiplied by `scale`, and added to `main_grad` if that is given here.
        """
        if self.main_grad is not None:
            return placeholder(self.weight)
        if main_grad is not None:
            main_grad.add_(self.total) if scale is None else main_grad.addcmul_(self.total, scale.to(self.total.dtype))
            return placeholder(self.weight)
        return (self.total if scale is None else self.total * scale).to(self.weight.dtype)


def placeholder(weight: Tensor) -> Tensor | None:
    """Return a weight's gradient for autograd when main_grad holds the gradient itself.

    Megatron's hooks (its gradient-accumulation fusion) expect a tensor, do not add it when `grad_added_to_main_grad`
    is set, and expect zeros where another use of the weight, a tied embedding, is added to it.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
