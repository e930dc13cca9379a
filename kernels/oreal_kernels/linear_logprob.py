"""Log-probs and entropies of labels from hidden states, without the logits of all rows at once.

The logits exist for a chunk of rows at a time. Those that fit into the budget are kept for the backward (three matrix
products in all), the others are computed again (four).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_kernels import collective
from oreal_kernels.chunk_plan import Plan
from oreal_kernels.combine import Combined, combine
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
from oreal_kernels.logprob_from_logits import reference as from_logits


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same on one rank, all logits at once, differentiated by torch; in fp64 if the inputs are."""
    if rows is not None:
        hidden = hidden.index_select(0, rows)
    logits = hidden @ weight.t()
    return from_logits(logits, labels, temperature=temperature, softcap=softcap, vocab_size=vocab_size)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, head: Head, counted, rows, main_grad, sequence_parallel, how: Plan, grad_enabled):
        x = take(hidden, rows, head.group if sequence_parallel else None)
        differentiated = grad_enabled and any(ctx.needs_input_grad)
        keep = how.kept_chunks if differentiated else 0
        parts, kept, buffer = [], [], None
        for number, piece in enumerate(chunks(len(counted), how.chunk_rows)):
            if number < keep:
                kept.append(head.logits(x, piece))
                parts.append(head.statistics(kept[-1], piece))
            elif not differentiated and head.fuses(x):
                parts.append(head.fused_statistics(x, piece))
            else:
                logits = buffer = head.logits(x, piece, buffer)
                parts.append(head.statistics(logits, piece))
        # Without rows no rank exchanges anything: all have the same ones.
        nothing = hidden.new_empty(1, 4, 0, dtype=torch.float32)
        combined = head.gathered(torch.cat(parts, 1)) if parts else combine(nothing)
        ctx.save_for_backward(hidden, weight, counted)
        ctx.kept, ctx.combined, ctx.rest = kept, combined, (head, rows, main_grad, sequence_parallel, how)
        return torch.where(counted, combined.logp, 0), torch.where(counted, combined.entropy, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, counted = ctx.saved_tensors
        head, rows, main_grad, sequence_parallel, how = ctx.rest
        x = take(hidden, rows, head.group if sequence_parallel else None)
        a, b = (torch.where(counted, grad.float(), 0) for grad in (grad_logp, grad_entropy))
        # Gradients overwrite the logits that were kept: a second backward finds none and computes them again.
        kept, ctx.kept = ctx.kept, []
        dhidden = InputGradient(x, head, sequence_parallel) if ctx.needs_input_grad[0] else None
        dweight = WeightGradient(weight, main_grad) if ctx.needs_input_grad[1] else None
        buffer = None
        for piece in chunks(len(counted), how.chunk_rows):
            if kept:
                logits = kept.pop(0)
            else:
                logits = buffer = head.logits(x, piece, buffer)
            here = Combined(*(row[..., piece] for row in ctx.combined))
            dlogits = head.dlogits(logits, piece, here, a[piece], b[piece], x.dtype)
            del logits
            if dhidden:
                dhidden.add(dlogits, piece)
            if dweight:
                dweight.add(dlogits, x[piece])
        grads = dhidden and dhidden.result(rows, hidden), dweight and dweight.result()
        return *grads, *[None] * 7


def linear_logprob(
    hidden: Tensor,  # [M, H]; [M / tp, H] when sequence_parallel
    weight: Tensor,  # [V', H]: this rank's rows of the output layer
    labels: Tensor,  # [N] int64; -100: the row counts for nothing
    *,
    rows: Tensor | None = None,  # [N] distinct: each label's row of the whole sequence; None: N = M
    temperature: float | Tensor = 1.0,  # or [N]
    softcap: float = 0.0,
    vocab_size: int | None = None,  # of all ranks; what lies beyond it is padding
    vocab_start: int | None = None,  # of this rank; None: equal shares
    group: dist.ProcessGroup | None = None,  # tensor-parallel
    sequence_parallel: bool = False,
    logits_dtype: torch.dtype | None = None,  # None: that of hidden; torch.float32 keeps what bf16 would round
    mode: str = "auto",  # or "save", "recompute": see plan.py
    budget_bytes: int = BUDGET_BYTES,
    main_grad: Tensor | None = None,  # [V', H] fp32: the backward adds the weight's gradient here
) -> tuple[Tensor, Tensor]:
    """Log-prob [N] of each label and entropy [N] of each row's distribution, in nats, fp32, differentiable.

    One all-gather of [4, N] in the forward; all ranks get the same bits. The gradient of `hidden` is summed over the
    ranks (and scattered when sequence_parallel). Raises where a label lies outside the vocabulary.
    """
    ranks = collective.size(group) if sequence_parallel else 1
    hidden, weight, labels = checked(hidden, weight, labels, rows, ranks)
    own = Slice.of(len(weight), vocab_size, vocab_start, group)
    head = own.head(weight, labels, temperature, softcap, group, logits_dtype or hidden.dtype)
    how = head.plan(mode, budget_bytes)
    rest = rows, main_grad, sequence_parallel, how, torch.is_grad_enabled()
    return _LinearLogProb.apply(hidden, weight, head, labels != IGNORED, *rest)
