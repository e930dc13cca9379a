"""Log-probs and entropies of labels from existing logits, with the vocabulary split over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_kernels.collective import gather_statistics
from oreal_kernels.combine import combine
from oreal_kernels.row_gradient import row_coefficients, row_gradient
from oreal_kernels.row_statistics import row_statistics
from oreal_kernels.vocab_head import IGNORE_LABEL, VocabShard, check_labels, inverse_temperatures


def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the same on one rank, differentiated by torch; in fp64 if the logits are."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    z = logits[:, :vocab_size].to(wide)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    scale = temperature.to(wide)[:, None] if isinstance(temperature, Tensor) else temperature
    log_p = torch.log_softmax(z / scale, 1)
    counted = labels != IGNORE_LABEL
    logp = log_p.gather(1, torch.where(counted, labels, 0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(1)
    return torch.where(counted, logp, 0), torch.where(counted, entropy, 0)


class _LogProbFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, label_column, scale, softcap, columns, group, counted, in_place):
        local = row_statistics(logits, label_column, scale, softcap, columns)
        combined = combine(gather_statistics(local, group))
        ctx.save_for_backward(logits, label_column, scale, counted, *combined)
        ctx.options = softcap, columns, in_place
        ctx.set_materialize_grads(False)  # None: the entropy is not part of the loss
        return torch.where(counted, combined.logp, 0), torch.where(counted, combined.entropy, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        logits, label_column, scale, counted, statistics, _, log_total, entropy = ctx.saved_tensors
        softcap, columns, in_place = ctx.options
        a, b = row_coefficients(counted, grad_logp, grad_entropy)
        out = logits if in_place else torch.empty_like(logits)
        row_gradient(logits, out, label_column, scale, softcap, columns, statistics[0], log_total, entropy, a, b)
        if in_place:  # a second backward then finds a changed tensor, and torch says so
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None, None, None, None, None


def logprob_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
    vocab_start: int | None = None,
    group: dist.ProcessGroup | None = None,
    in_place_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the log-prob of each label and the entropy of each row's distribution, differentiable.

    The forward makes one all-gather of [4, N]; the backward exchanges nothing.

    Args:
        logits: [N, V'] of this rank.
        labels: [N] integer token ids. A row with label -100 does not count: log-prob and entropy are 0.
        temperature: divisor of the logits, above 0; one number or [N].
        softcap: s of s tanh(logit / s), applied before the temperature; 0: none.
        vocab_size: tokens over all ranks; further columns are padding. None: all columns count.
        vocab_start: first token id of this rank, with vocab_size. None: equal shards in rank order.
        group: tensor-parallel process group that the vocabulary is split over. None: one rank.
        in_place_backward: let the gradient overwrite the logits, which then must not be used any more.

    Returns:
        Log-probs [N] and entropies [N], in nats, fp32.

    Raises:
        ValueError: shapes do not fit, temperature is not above 0, vocab_start without vocab_size.
        TypeError: labels are not integers.
        RuntimeError: a label lies outside the vocabulary (on a GPU at a later call).
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits are {list(logits.shape)} and labels {list(labels.shape)}; expected [N, V] and [N]")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    labels = check_labels(labels)
    shard = VocabShard.of_rank(logits.shape[1], vocab_size, vocab_start, group)
    scale = inverse_temperatures(temperature, len(labels), logits.device)
    return _LogProbFromLogits.apply(
        logits, shard.label_column(labels), scale, float(softcap), shard.columns, group, labels != IGNORE_LABEL,
        in_place_backward,
    )  # fmt: skip
