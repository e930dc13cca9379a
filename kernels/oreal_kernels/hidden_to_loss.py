"""OREAL's policy loss from hidden states, with its gradient computed in the forward.

It takes three matrix products and the logits of one chunk. This is possible because each row's gradient needs its own
log-prob and `LossTerms` only. Consequences:

- the loss must be the last operation before backward(): its gradient may only be scaled, by `loss_scale` if given;
- with `main_grad` and `loss_scale` the weight's gradient is added in the forward, and a backward must follow;
- without `loss_scale` the weight's gradient stays in an fp32 buffer of its own until the backward.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_kernels import collective
from oreal_kernels.hidden_to_logprob import reference as logprob_reference
from oreal_kernels.policy_loss import SUMS, LossTerms, policy_terms
from oreal_kernels.policy_loss import reference as policy_loss_reference
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


class OrealLossResult(NamedTuple):
    """Loss of some tokens; the sums and log-probs are for metrics."""

    loss: Tensor  # scalar fp32
    sums: Tensor  # [8] fp64, detached, named by SUMS
    logp: Tensor  # [N] fp32, detached
    entropy: Tensor  # [N] fp32 of each row's distribution over the vocabulary, nats, detached; 0 where no label counts


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, terms: LossTerms, **head: Any) -> OrealLossResult:
    """Compute the same on one rank with all logits at once, differentiated by torch; in fp64 if the inputs are.

    Keyword arguments are those of the reference of `linear_logprob`.
    """
    logp, entropy = logprob_reference(hidden, weight, labels, **head)
    counted = (labels != IGNORE_LABEL).to(logp.dtype)
    loss, sums = policy_loss_reference(logp, _mask_terms(counted, terms))
    return OrealLossResult(loss - terms.entropy_scale * entropy.sum(), sums, logp.detach(), entropy.detach())


class _LinearOrealLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, head: VocabHead, counted, terms, rows, main_grad, sequence_parallel, budget, scale
    ):
        wants_input, wants_weight = ctx.needs_input_grad[:2]
        into_main_grad = main_grad is not None and scale is not None and wants_weight
        if into_main_grad:
            _refuse_checkpoint()
        x = gather_inputs(hidden, rows, head.group if sequence_parallel else None)
        dhidden = InputGradient(x, head, sequence_parallel) if wants_input else None
        dweight = WeightGradient(weight, main_grad if into_main_grad else None) if wants_weight else None
        logp = torch.zeros(len(counted), dtype=torch.float32, device=x.device)
        entropy = torch.zeros_like(logp)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=x.device)
        buffer = None
        for chunk in row_chunks(len(counted), head.plan("recompute", budget).chunk_rows):
            logits = buffer = head.logits(x, chunk, buffer)
            combined = head.combine_ranks(head.statistics(logits, chunk))
            logp[chunk] = torch.where(counted[chunk], combined.logp, 0)
            slope, chunk_sums = policy_terms(logp[chunk], terms.select(chunk))
            sums += chunk_sums
            entropy[chunk] = torch.where(counted[chunk], combined.entropy, 0)
            a = torch.where(counted[chunk], slope if scale is None else slope * scale, 0)
            b = _entropy_slope(counted[chunk], terms, scale)
            dlogits = head.dlogits(logits, chunk, combined, a, b, x.dtype)
            if dhidden:
                dhidden.add(dlogits, chunk)
            if dweight:
                dweight.add(dlogits, x[chunk])
        ctx.dhidden = dhidden and dhidden.result(rows, hidden)
        ctx.dweight, ctx.main_grad, ctx.scale = dweight, main_grad, scale
        ctx.pending = _PendingBackward() if into_main_grad else None
        ctx.mark_non_differentiable(sums, logp, entropy)
        loss = terms.loss(sums) - terms.entropy_scale * entropy.sum() if terms.entropy_coef else terms.loss(sums)
        return loss, sums, logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.pending is not None:
            ctx.pending.resolve()
        dhidden, dweight = ctx.dhidden, ctx.dweight
        if ctx.scale is None:
            dhidden = None if dhidden is None else dhidden * grad_loss  # a scalar: not rounded to bf16 first
            return dhidden, dweight and dweight.result(ctx.main_grad, grad_loss), *[None] * 8
        as_given = grad_loss == torch.as_tensor(ctx.scale, dtype=grad_loss.dtype, device=grad_loss.device)
        torch._assert_async(as_given, "linear_oreal_loss: the loss's gradient differs from the given loss_scale")
        return dhidden, dweight and dweight.result(ctx.main_grad, torch.ones_like(grad_loss)), *[None] * 8


class _PendingBackward:
    """Mark of a gradient that is in main_grad although its backward has not run."""

    def __init__(self):
        self.resolved = False

    def resolve(self) -> None:
        if self.resolved:
            raise RuntimeError(
                "linear_oreal_loss: a second backward would lack the weight's gradient, which the forward has "
                "added to main_grad; call without loss_scale if several backwards are needed"
            )
        self.resolved = True

    def __del__(self):
        if not self.resolved:
            warnings.warn(
                "linear_oreal_loss: its gradient is in main_grad, but its backward never ran; zero main_grad before "
                "the next step, or use torch.no_grad() where no gradient is needed",
                stacklevel=2,
            )


def _refuse_checkpoint() -> None:
    """Raise within a non-reentrant activation checkpoint: its second forward would add to main_grad again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint":
        raise RuntimeError(
            "linear_oreal_loss with main_grad and loss_scale must not be checkpointed: the recomputation would add "
            "the weight's gradient twice; leave the head out of the checkpoint, it saves no logits anyway"
        )


def linear_oreal_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    terms: LossTerms,
    *,
    rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    logits_dtype: torch.dtype | None = None,
    budget_bytes: int = BUDGET_BYTES,
    main_grad: Tensor | None = None,
    loss_scale: float | Tensor | None = None,
) -> OrealLossResult:
    """Compute OREAL's policy loss and its gradient in one forward; one all-gather of [4, n] per chunk.

    Under torch.no_grad() only the loss is computed.

    Args:
        hidden: [M, H] hidden states of the sequence, in the dtype of `weight`; [M / tp, H] when sequence_parallel.
        weight: [V', H] this rank's rows of the output layer.
        labels: [N] integer token ids. A row with label -100 does not count: it adds nothing to the loss or the sums.
        terms: the loss apart from the policy's log-probs, for N tokens.
        rows: [N] distinct row numbers of the full sequence, one for each label. None: labels are for all M rows.
        temperature: divisor of the logits, above 0; one number or [N].
        softcap: s of s tanh(logit / s), applied before the temperature; 0: none.
        vocab_size: tokens over all ranks; further columns are padding. None: all columns count.
        vocab_start: first token id of this rank, with vocab_size. None: equal shards in rank order.
        group: tensor-parallel process group that the vocabulary is split over. None: one rank.
        sequence_parallel: hidden states are split over `group` along the sequence.
        logits_dtype: dtype of the logits. None: that of hidden; torch.float32 keeps the digits that bf16 rounds off.
        budget_bytes: memory for the logits of one chunk, in bytes per rank.
        main_grad: [V', H] fp32 buffer that the weight's gradient is added to: in the forward when loss_scale is
            given, else in the backward. None: autograd gets the gradient.
        loss_scale: gradient that the loss will receive in backward(), where it is known (scalar).

    Returns:
        The loss (fp32 scalar, differentiable), its sums, the log-probs and the entropies.

    Raises:
        ValueError: shapes do not fit, temperature is not above 0, vocab_start without vocab_size, or the offsets of
            `terms` do not rise from 0 to N (on a GPU at a later call).
        TypeError: labels are not integers, or hidden and weight differ in dtype.
        RuntimeError: a label lies outside the vocabulary, or the loss's gradient is not loss_scale (both on a GPU at a
            later call); with main_grad and loss_scale also for a second backward, or within an activation checkpoint.
    """
    ranks = collective.size(group) if sequence_parallel else 1
    hidden, weight, labels = check_inputs(hidden, weight, labels, rows, ranks)
    terms.check(len(labels))
    if len(terms.weight) != len(labels):
        raise ValueError(
            f"terms are for {len(terms.weight)} tokens and labels for {len(labels)}; expected equally many"
        )
    shard = VocabShard.of_rank(len(weight), vocab_size, vocab_start, group)
    head = shard.head(weight, labels, temperature, softcap, group, logits_dtype or hidden.dtype)
    counted = labels != IGNORE_LABEL
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    options = rows, main_grad, sequence_parallel, budget_bytes, loss_scale
    return OrealLossResult(
        *_LinearOrealLoss.apply(hidden, weight, head, counted, _mask_terms(counted, terms), *options)
    )


def _entropy_slope(counted: Tensor, terms: LossTerms, scale: float | Tensor | None) -> Tensor | None:
    """Return dL/d(entropy) [n]; None without an entropy term, which costs nothing then."""
    if not terms.entropy_coef:
        return None
    slope = torch.where(counted, -terms.entropy_scale, 0.0)
    return slope if scale is None else slope * scale


def _mask_terms(counted: Tensor, terms: LossTerms) -> LossTerms:
    """Return terms that are 0 in rows that do not count, whose log-prob is 0."""
    reference_logp = torch.where(counted.bool(), terms.reference_logp, 0)
    return replace(terms, reference_logp=reference_logp, weight=torch.where(counted.bool(), terms.weight, 0))
