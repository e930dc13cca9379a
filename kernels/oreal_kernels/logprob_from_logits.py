"""Log-probs and entropies of labels from logits that are there already, the vocabulary cut over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_kernels.collective import gather_parts
from oreal_kernels.combine import combine
from oreal_kernels.head import IGNORED, Slice, inverse
from oreal_kernels.row_gradient import row_gradient
from oreal_kernels.row_statistics import row_statistics


def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same on one rank, differentiated by torch; in fp64 if the logits are."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    z = logits[:, :vocab_size].to(wide)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    scale = temperature.to(wide)[:, None] if isinstance(temperature, Tensor) else temperature
    log_p = torch.log_softmax(z / scale, 1)
    counted = labels != IGNORED
    logp = log_p.gather(1, torch.where(counted, labels, 0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(1)
    return torch.where(counted, logp, 0), torch.where(counted, entropy, 0)


class _LogProbFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, label_column, scale, softcap, columns, group, counted, in_place):
        mine = row_statistics(logits, label_column, scale, softcap, columns)
        combined = combine(gather_parts(mine, group))
        ctx.save_for_backward(logits, label_column, scale, counted, *combined)
        ctx.rest = softcap, columns, in_place
        return torch.where(counted, combined.logp, 0), torch.where(counted, combined.entropy, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        logits, label_column, scale, counted, statistics, _, *normaliser = ctx.saved_tensors
        softcap, columns, in_place = ctx.rest
        a, b = (torch.where(counted, grad.float(), 0) for grad in (grad_logp, grad_entropy))
        out = logits if in_place else torch.empty_like(logits)
        row_gradient(logits, out, label_column, scale, softcap, columns, statistics[0], *normaliser, a, b)
        if in_place:  # a second backward then finds a changed tensor, and torch says so
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None, None, None, None, None


def logprob_from_logits(
    logits: Tensor,  # [N, V'] of this rank
    labels: Tensor,  # [N] int64; -100: the row counts for nothing
    *,
    temperature: float | Tensor = 1.0,  # or [N]
    softcap: float = 0.0,
    vocab_size: int | None = None,  # of all ranks; what lies beyond it is padding
    vocab_start: int | None = None,  # of this rank; None: equal shares
    group: dist.ProcessGroup | None = None,
    in_place_backward: bool = False,  # the gradient overwrites the logits, which nobody may need any more
) -> tuple[Tensor, Tensor]:
    """Log-prob [N] and entropy [N] in nats, fp32, differentiable. One all-gather of [4, N]; nothing in the backward."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits are {list(logits.shape)} and labels {list(labels.shape)}; wanted [N, V] and [N]")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    labels = labels.long()
    own = Slice.of(logits.shape[1], vocab_size, vocab_start, group)
    scale = inverse(temperature, len(labels), logits.device)
    return _LogProbFromLogits.apply(
        logits, own.label_column(labels), scale, float(softcap), own.columns, group, labels != IGNORED,
        in_place_backward,
    )  # fmt: skip
