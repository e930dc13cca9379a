"""Log-probs and entropies of labels from hidden states, without the logits of all rows at once.

The logits exist for a chunk of rows at a time. Those that fit into the budget are saved for the backward (three matrix
products in total), the others are recomputed (four).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_kernels import collective
from oreal_kernels.chunk_plan import ChunkPlan
from oreal_kernels.combine import Combined, combine
from oreal_kernels.logits_to_logprob import reference as from_logits
from oreal_kernels.row_gradient import row_coefficients
from oreal_kernels.vocab_head import (  # fmt: skip
    BUDGET_BYTES,
    IGNORE_LABEL,
    InputGradient,
    VocabHead,
    VocabShard,
    WeightGradient,
    check_inputs,
    gather_inputs,
    row_chunks,
)


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
    """Compute the same on one rank with all logits at once, differentiated by torch; in fp64 if the inputs are."""
    if rows is not None:
        hidden = hidden.index_select(0, rows)
    logits = hidden @ weight.t()
    return from_logits(logits, labels, temperature=temperature, softcap=softcap, vocab_size=vocab_size)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, head: VocabHead, counted, rows, main_grad, sequence_parallel, plan: ChunkPlan, grad_enabled
    ):
        x = gather_inputs(hidden, rows, head.group if sequence_parallel else None)
        differentiated = grad_enabled and any(ctx.needs_input_grad)
        chunks_to_save = plan.saved_chunks if differentiated else 0
        parts, saved, buffer = [], [], None
        for number, chunk in enumerate(row_chunks(len(counted), plan.chunk_rows)):
            if number < chunks_to_save:
                saved.append(head.logits(x, chunk))
                parts.append(head.statistics(saved[-1], chunk))
            else:
                logits = buffer = head.logits(x, chunk, buffer)
                parts.append(head.statistics(logits, chunk))
        # Without rows no rank exchanges anything; all ranks have the same rows.
        empty = hidden.new_empty(1, 4, 0, dtype=torch.float32)
        combined = head.combine_ranks(torch.cat(parts, 1)) if parts else combine(empty)
        ctx.save_for_backward(hidden, weight, counted)
        ctx.saved_logits, ctx.combined = saved, combined
        ctx.arguments = head, rows, main_grad, sequence_parallel, plan
        ctx.set_materialize_grads(False)  # None: the entropy is not part of the loss
        return torch.where(counted, combined.logp, 0), torch.where(counted, combined.entropy, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, counted = ctx.saved_tensors
        head, rows, main_grad, sequence_parallel, plan = ctx.arguments
        x = gather_inputs(hidden, rows, head.group if sequence_parallel else None)
        a, b = row_coefficients(counted, grad_logp, grad_entropy)
        # Gradients overwrite the saved logits: a second backward finds none and recomputes them.
        saved, ctx.saved_logits = ctx.saved_logits, []
        dhidden = InputGradient(x, head, sequence_parallel) if ctx.needs_input_grad[0] else None
        dweight = WeightGradient(weight, main_grad) if ctx.needs_input_grad[1] else None
        buffer = None
        for chunk in row_chunks(len(counted), plan.chunk_rows):
            if saved:
                logits = saved.pop(0)
            else:
                logits = buffer = head.logits(x, chunk, buffer)
            combined = Combined(*(values[..., chunk] for values in ctx.combined))
            dlogits = head.dlogits(logits, chunk, combined, a[chunk], b if b is None else b[chunk], x.dtype)
            del logits
            if dhidden:
                dhidden.add(dlogits, chunk)
            if dweight:
                dweight.add(dlogits, x[chunk])
        grads = dhidden and dhidden.result(rows, hidden), dweight and dweight.result()
        return *grads, *[None] * 7


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    logits_dtype: torch.dtype | None = None,
    mode: str = "auto",
    budget_bytes: int = BUDGET_BYTES,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the log-prob of each label and the entropy of each row's distribution, differentiable.

    The forward makes one all-gather of [4, N]; all ranks get the same bits. The gradient of `hidden` is summed over
    the ranks, and scattered when sequence_parallel.

    Args:
        hidden: [M, H] hidden states of the sequence, in the dtype of `weight`; [M / tp, H] when sequence_parallel.
        weight: [V', H] this rank's rows of the output layer.
        labels: [N] integer token ids. A row with label -100 does not count: log-prob and entropy are 0.
        rows: [N] distinct row numbers of the full sequence, one for each label. None: labels are for all M rows.
        temperature: divisor of the logits, above 0; one number or [N].
        softcap: s of s tanh(logit / s), applied before the temperature; 0: none.
        vocab_size: tokens over all ranks; further columns are padding. None: all columns count.
        vocab_start: first token id of this rank, with vocab_size. None: equal shards in rank order.
        group: tensor-parallel process group that the vocabulary is split over. None: one rank.
        sequence_parallel: hidden states are split over `group` along the sequence.
        logits_dtype: dtype of the logits. None: that of hidden; torch.float32 keeps the digits that bf16 rounds off.
        mode: "auto" saves as many logits for the backward as fit into the budget, "save" all, "recompute" none.
        budget_bytes: memory for logits, in bytes per rank.
        main_grad: [V', H] fp32 buffer that the backward adds the weight's gradient to, as Megatron's gradient
            accumulation fusion does. None: autograd gets the gradient.

    Returns:
        Log-probs [N] and entropies [N], in nats, fp32.

    Raises:
        ValueError: shapes do not fit, temperature is not above 0, mode is unknown, vocab_start without vocab_size.
        TypeError: labels are not integers, or hidden and weight differ in dtype.
        RuntimeError: a label lies outside the vocabulary (on a GPU at a later call).
    """
    ranks = collective.size(group) if sequence_parallel else 1
    hidden, weight, labels = check_inputs(hidden, weight, labels, rows, ranks)
    shard = VocabShard.of_rank(len(weight), vocab_size, vocab_start, group)
    head = shard.head(weight, labels, temperature, softcap, group, logits_dtype or hidden.dtype)
    plan = head.plan(mode, budget_bytes)
    options = rows, main_grad, sequence_parallel, plan, torch.is_grad_enabled()
    return _LinearLogProb.apply(hidden, weight, head, labels != IGNORE_LABEL, *options)
