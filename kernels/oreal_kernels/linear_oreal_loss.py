"""Hidden states -> OREAL's policy loss, the gradient taken in the forward: three matrix products, logits of one chunk.

Legal because each row's gradient needs its own log-prob and what `Terms` knows beforehand. What follows from it:

- the loss must be the last thing before backward(): its gradient may only be scaled, by `loss_scale` if that is given;
- with `main_grad` and `loss_scale` the weight's gradient is added in the forward, and a backward has to follow;
- without `loss_scale` the weight's gradient waits in an fp32 buffer of its own until the backward.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_kernels import collective, oreal_loss
from oreal_kernels.head import (
    BUDGET_BYTES,
    IGNORED,
    Head,
    InputGradient,
    Slice,
    WeightGradient,
    checked,
    chunks,
    take,
)  # fmt: skip
from oreal_kernels.linear_logprob import reference as logprob_reference
from oreal_kernels.oreal_loss import SUMS, Terms, policy_terms


class Result(NamedTuple):
    loss: Tensor  # scalar fp32
    sums: Tensor  # [8] fp64, detached, named by SUMS
    logp: Tensor  # [N] fp32, detached


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, terms: Terms, **head: Any) -> Result:
    """The same on one rank, all logits at once, differentiated by torch; in fp64 if the inputs are."""
    logp, _ = logprob_reference(hidden, weight, labels, **head)
    counted = (labels != IGNORED).to(logp.dtype)
    loss, sums = oreal_loss.reference(logp, _only(counted, terms))
    return Result(loss, sums, logp.detach())


class _LinearOrealLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, head: Head, counted, terms, rows, main_grad, sequence_parallel, budget, scale):
        wants_input, wants_weight = ctx.needs_input_grad[:2]
        straight = main_grad is not None and scale is not None and wants_weight
        if straight:
            _refuse_checkpoint()
        x = take(hidden, rows, head.group if sequence_parallel else None)
        dhidden = InputGradient(x, head, sequence_parallel) if wants_input else None
        dweight = WeightGradient(weight, main_grad if straight else None) if wants_weight else None
        logp = torch.zeros(len(counted), dtype=torch.float32, device=x.device)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=x.device)
        buffer = None
        for piece in chunks(len(counted), head.plan("recompute", budget).chunk_rows):
            logits = buffer = head.logits(x, piece, buffer)
            combined = head.gathered(head.statistics(logits, piece))
            logp[piece] = torch.where(counted[piece], combined.logp, 0)
            slope, more = policy_terms(logp[piece], terms.cut(piece))
            sums += more
            a = torch.where(counted[piece], slope if scale is None else slope * scale, 0)
            dlogits = head.dlogits(logits, piece, combined, a, torch.zeros_like(a), x.dtype)
            if dhidden:
                dhidden.add(dlogits, piece)
            if dweight:
                dweight.add(dlogits, x[piece])
        ctx.dhidden = dhidden and dhidden.result(rows, hidden)
        ctx.dweight, ctx.main_grad, ctx.scale = dweight, main_grad, scale
        ctx.pending = _Pending() if straight else None
        ctx.mark_non_differentiable(sums, logp)
        return terms.loss(sums), sums, logp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.pending is not None:
            ctx.pending.resolve()
        dhidden, dweight = ctx.dhidden, ctx.dweight
        if ctx.scale is None:
            dhidden = None if dhidden is None else dhidden * grad_loss  # a scalar: not rounded to bf16 first
            return dhidden, dweight and dweight.result(ctx.main_grad, grad_loss), *[None] * 8
        as_announced = grad_loss == torch.as_tensor(ctx.scale, dtype=grad_loss.dtype, device=grad_loss.device)
        torch._assert_async(as_announced, "linear_oreal_loss: the loss's gradient differs from the loss_scale given")
        return dhidden, dweight and dweight.result(ctx.main_grad, torch.ones_like(grad_loss)), *[None] * 8


class _Pending:
    """A gradient that stands in main_grad although its backward has not run."""

    def __init__(self):
        self.resolved = False

    def resolve(self) -> None:
        if self.resolved:
            raise RuntimeError(
                "linear_oreal_loss: a second backward would leave the weight's gradient out, which the forward has "
                "added to main_grad; call without loss_scale to keep it for several backwards"
            )
        self.resolved = True

    def __del__(self):
        if not self.resolved:
            warnings.warn(
                "linear_oreal_loss: its gradient is in main_grad, but its backward never ran; zero main_grad before "
                "the next step, or use torch.no_grad() where no gradient is wanted",
                stacklevel=2,
            )


def _refuse_checkpoint() -> None:
    """A checkpoint without reentrance runs the forward twice with gradients on, which would add to main_grad twice."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint":
        raise RuntimeError(
            "linear_oreal_loss with main_grad and loss_scale must not be checkpointed: the recomputation would add "
            "the weight's gradient twice; leave the head out of the checkpoint, it keeps no logits anyway"
        )


def linear_oreal_loss(
    hidden: Tensor,  # [M, H]; [M / tp, H] when sequence_parallel
    weight: Tensor,  # [V', H]: this rank's rows of the output layer
    labels: Tensor,  # [N] int64; -100: the row counts for nothing
    terms: Terms,
    *,
    rows: Tensor | None = None,  # [N] distinct: each label's row of the whole sequence; None: N = M
    temperature: float | Tensor = 1.0,  # or [N]
    softcap: float = 0.0,
    vocab_size: int | None = None,  # of all ranks; what lies beyond it is padding
    vocab_start: int | None = None,  # of this rank; None: equal shares
    group: dist.ProcessGroup | None = None,  # tensor-parallel
    sequence_parallel: bool = False,
    logits_dtype: torch.dtype | None = None,  # None: that of hidden; torch.float32 keeps what bf16 would round
    budget_bytes: int = BUDGET_BYTES,
    main_grad: Tensor | None = None,  # [V', H] fp32: the weight's gradient is added here
    loss_scale: float | Tensor | None = None,  # the gradient that the loss will get in backward(), where it is known
) -> Result:
    """Loss (fp32 scalar, differentiable), its sums and log-probs. One all-gather of [4, n] a chunk.

    Without gradients (torch.no_grad) it only computes the loss. Raises for a label outside the vocabulary, for a
    second backward or a checkpoint where the gradient is in main_grad already, and when the loss's gradient is not
    `loss_scale`.
    """
    ranks = collective.size(group) if sequence_parallel else 1
    hidden, weight, labels = checked(hidden, weight, labels, rows, ranks)
    if len(terms.weight) != len(labels):
        raise ValueError(f"terms are of {len(terms.weight)} tokens, labels of {len(labels)}; they must be the same")
    own = Slice.of(len(weight), vocab_size, vocab_start, group)
    head = own.head(weight, labels, temperature, softcap, group, logits_dtype or hidden.dtype)
    counted = labels != IGNORED
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    rest = rows, main_grad, sequence_parallel, budget_bytes, loss_scale
    return Result(*_LinearOrealLoss.apply(hidden, weight, head, counted, _only(counted, terms), *rest))


def _only(counted: Tensor, terms: Terms) -> Terms:
    """Terms that are 0 where a row counts for nothing and its log-prob is 0."""
    reference_logp = torch.where(counted.bool(), terms.reference_logp, 0)
    return replace(terms, reference_logp=reference_logp, weight=torch.where(counted.bool(), terms.weight, 0))
