"""What the fused heads share: one rank's slice of the vocabulary, and the passes over a chunk of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_kernels import backend, chunk_plan, collective, gemm, triton_launch
from oreal_kernels.combine import Combined, combine
from oreal_kernels.linear_statistics import linear_statistics
from oreal_kernels.row_gradient import row_gradient
from oreal_kernels.row_statistics import row_statistics

IGNORED = -100  # label of rows that count for nothing
BUDGET_BYTES = 2**30  # for logits


@dataclass(frozen=True, slots=True)
class Slice:
    """Which part of the vocabulary this rank's rows of the output layer are."""

    start: int
    columns: int  # real rows of the weight; the rest is padding
    vocabulary: int  # of all ranks, without padding

    @classmethod
    def of(cls, width: int, vocab_size: int | None, start: int | None, group: dist.ProcessGroup | None) -> Slice:
        """The slice of a rank that holds `width` rows; equal shares in rank order unless `start` says otherwise."""
        if start is not None and vocab_size is None:
            raise ValueError("vocab_start is given, so shares may differ; give vocab_size too, which all ranks know")
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
    ) -> Head:
        scale, columns = inverse(temperature, len(labels), weight.device), self.columns
        at = self.label_column(labels)
        return Head(weight.detach(), self.vocabulary, at, scale, float(softcap), columns, group, logits_dtype)

    def label_column(self, labels: Tensor) -> Tensor:
        """[N] column of each label in this slice, or outside of it."""
        known = (labels == IGNORED) | ((labels >= 0) & (labels < self.vocabulary))
        # No host synchronisation: on a GPU the error shows at a later call.
        torch._assert_async(known.all(), f"a label is neither {IGNORED} nor within the vocabulary of {self.vocabulary}")
        return torch.where(labels == IGNORED, -1, labels - self.start)


@dataclass(frozen=True, slots=True)
class Head:
    """A slice of the output layer and the labels of N rows; `rows` below is a chunk of them."""

    weight: Tensor  # [V', H] of this rank
    vocabulary: int  # of all ranks
    label_column: Tensor  # [N]
    inverse_temperature: Tensor  # [N] fp32
    softcap: float
    columns: int
    group: dist.ProcessGroup | None
    logits_dtype: torch.dtype

    def plan(self, mode: str, budget_bytes: int) -> chunk_plan.Plan:
        # From what all ranks know, not from this rank's share: they must exchange the same chunks.
        share = -(-self.vocabulary // collective.size(self.group))
        sizes = {self.logits_dtype: self.logits_dtype.itemsize, self.weight.dtype: self.weight.dtype.itemsize}
        row_bytes = share * sum(sizes.values())  # logits, and gradients where those are of another dtype
        on, hidden = chunk_plan.machine(self.weight.device), self.weight.shape[1]
        return chunk_plan.choose(len(self.label_column), hidden, share, row_bytes, budget_bytes, mode, on)

    def logits(self, x: Tensor, rows: slice, buffer: Tensor | None = None) -> Tensor:
        """[n, V'], in a buffer of an earlier chunk when given."""
        x = x[rows]
        if buffer is None:
            buffer = torch.empty(len(x), len(self.weight), dtype=self.logits_dtype, device=x.device)
        return gemm.logits(x, self.weight, buffer[: len(x)])

    def statistics(self, logits: Tensor, rows: slice) -> Tensor:
        """[4, n] of this rank."""
        scale = self.inverse_temperature[rows]
        return row_statistics(logits, self.label_column[rows], scale, self.softcap, self.columns)

    def fuses(self, x: Tensor) -> bool:
        """Whether statistics without logits are the faster way, for a forward that no backward follows: its
        logits would have to be these very ones."""
        narrow = x.dtype.itemsize == 2 and x.shape[1] <= triton_launch.FUSED_FORWARD_MAX_HIDDEN
        # With a soft cap the kernel would spill registers on sm_90.
        return narrow and not self.softcap and backend.choose(x) == "triton"

    def fused_statistics(self, x: Tensor, rows: slice) -> Tensor:
        label, scale = self.label_column[rows], self.inverse_temperature[rows]
        return linear_statistics(x[rows], self.weight, label, scale, self.softcap, self.columns, self.logits_dtype)

    def gathered(self, mine: Tensor) -> Combined:
        """All ranks' statistics made one."""
        return combine(collective.gather_parts(mine, self.group))

    def dlogits(self, logits: Tensor, rows: slice, combined: Combined, a: Tensor, b: Tensor, dtype: torch.dtype):
        """[n, V'] in the dtype of the products, in place of the logits when that is theirs; all arguments [n]."""
        out = logits if logits.dtype is dtype else torch.empty_like(logits, dtype=dtype)
        label, scale = self.label_column[rows], self.inverse_temperature[rows]
        at = (combined.statistics[0], combined.log_total, combined.entropy, a, b)
        row_gradient(logits, out, label, scale, self.softcap, self.columns, *at)
        return out


def chunks(rows: int, chunk_rows: int) -> Iterator[slice]:
    for first in range(0, rows, chunk_rows):
        yield slice(first, min(first + chunk_rows, rows))


def inverse(temperature: float | Tensor, rows: int, device: torch.device) -> Tensor:
    """[rows] fp32 of 1 / temperature, given as a number or one per row."""
    if isinstance(temperature, Tensor):
        return temperature.to(device, torch.float64).reciprocal().float().expand(rows).contiguous()
    return torch.full((rows,), 1 / temperature, dtype=torch.float32, device=device)


def checked(hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, ranks: int) -> tuple[Tensor, ...]:
    """The inputs of a head, contiguous, labels as int64; raises ValueError where their shapes do not fit."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}; wanted [rows, H] and [vocabulary, H]"
        )
    there = len(hidden) * ranks if rows is None else len(rows)
    if labels.dim() != 1 or len(labels) != there:
        what = "rows of hidden" if rows is None else "entries of rows"
        raise ValueError(f"labels are {list(labels.shape)} for {there} {what}; every one needs a label, or {IGNORED}")
    return hidden.contiguous(), weight.contiguous(), labels.long()


def take(hidden: Tensor, rows: Tensor | None, gather_over: dist.ProcessGroup | None) -> Tensor:
    """[N, H]: the rows that have a label, out of the whole sequence."""
    if collective.size(gather_over) > 1:
        hidden = collective.gather_rows(hidden, gather_over)
    return hidden if rows is None else hidden.index_select(0, rows)


class InputGradient:
    """d loss / d hidden, chunk by chunk; sums over tensor-parallel ranks run beside the weight's product."""

    def __init__(self, x: Tensor, head: Head, sequence_parallel: bool):
        self.total, self.weight, self.group = torch.empty_like(x), head.weight, head.group
        self.scattered, self.works = sequence_parallel and collective.size(head.group) > 1, []

    def add(self, dlogits: Tensor, rows: slice) -> None:
        torch.mm(dlogits, self.weight, out=self.total[rows])
        if not self.scattered:
            self.works.append(collective.sum_over(self.total[rows], self.group))

    def result(self, rows: Tensor | None, hidden: Tensor) -> Tensor:
        """In the shape of `hidden`, zero where no row was taken."""
        for work in filter(None, self.works):
            work.wait()
        whole = self.total
        if rows is not None:
            ranks = self.group.size() if self.scattered else 1
            whole = whole.new_zeros(ranks * len(hidden), hidden.shape[1]).index_copy_(0, rows, whole)
        return collective.scatter_sum(whole, self.group) if self.scattered else whole


class WeightGradient:
    """d loss / d weight, summed over chunks in fp32: in `main_grad` when given, else in a buffer of its own."""

    def __init__(self, weight: Tensor, main_grad: Tensor | None):
        self.weight, self.main_grad = weight, main_grad
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.total = torch.zeros_like(weight, dtype=wide) if main_grad is None else main_grad

    def add(self, dlogits: Tensor, x: Tensor) -> None:
        gemm.add_weight_gradient(dlogits, x, self.total)

    def result(self, main_grad: Tensor | None = None, scale: Tensor | None = None) -> Tensor | None:
        """What autograd is given: the gradient, or what Megatron wants to see when it is in main_grad.

        A sum in a buffer of its own is scaled first, and goes to `main_grad` if that is given here.
        """
        if self.main_grad is None:
            if main_grad is not None:
                main_grad.addcmul_(self.total, scale.to(self.total.dtype))
                return placeholder(self.weight)
            return (self.total if scale is None else self.total * scale).to(self.weight.dtype)
        return placeholder(self.weight)


def placeholder(weight: Tensor) -> Tensor | None:
    """A weight's gradient when main_grad holds the real one.

    Megatron's hooks (its gradient-accumulation fusion) want a tensor, do not add it when `grad_added_to_main_grad`
    says so, and want zeros where another use of the weight, a tied embedding, joins it.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
