"""Token weights from the token-level reward model's scores, for sequences laid end to end (cu_seqlens).

The belief that an answer is right is sigmoid(mean of the scores so far); right answers are weighted by it, wrong ones
by its complement, and `threshold` maps [threshold, 1] to [0, 1]: at 0.5 that is Eq. 10 of arXiv 2502.06781.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oreal_kernels import backend, native, triton_launch


def owners(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[T] number of the sequence of each token."""
    place = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True)


def reference(
    scores: Tensor,  # [T]
    cu_seqlens: Tensor,  # [B + 1] int64, from 0 to T
    right: Tensor,  # [B] bool
    threshold: float,  # in [0, 1)
) -> tuple[Tensor, Tensor]:
    """Weights [T] in [0, 1] and the mean score [B] of each sequence (0 for an empty one), both detached, fp32."""
    length = cu_seqlens.diff()
    owner = owners(cu_seqlens, len(scores))
    total = torch.cat([scores.new_zeros(1, dtype=torch.float64), scores.detach().double().cumsum(0)])
    before = total[cu_seqlens[:-1]]  # [B]
    read = torch.arange(len(scores), device=scores.device) - cu_seqlens[owner] + 1
    so_far = (total[1:] - before[owner]) / read
    belief = torch.sigmoid(torch.where(right[owner], so_far, -so_far))
    weight = ((belief - threshold) / (1 - threshold)).clamp(0, 1)
    mean = (total[cu_seqlens[1:]] - before) / length.clamp(min=1)
    return weight.float(), mean.float()


@triton.jit
def weights_kernel(scores, cu_seqlens, right, weights, means, threshold, BLOCK: tl.constexpr):
    # One program scans one sequence; a pack has few, and 14k tokens are 14 blocks.
    sequence = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_seqlens + sequence)
    stop = tl.load(cu_seqlens + sequence + 1)
    sign = tl.where(tl.load(right + sequence) != 0, 1.0, -1.0)
    carried = tl.full((), 0.0, tl.float32)
    for start in range(first, stop, BLOCK):
        token = start + tl.arange(0, BLOCK)
        score = tl.load(scores + token, mask=token < stop, other=0.0).to(tl.float32)
        so_far = (carried + tl.cumsum(score, 0)) / (token - first + 1).to(tl.float32)
        belief = 1.0 / (1.0 + tl.exp(-sign * so_far))
        weight = tl.minimum(tl.maximum((belief - threshold) / (1.0 - threshold), 0.0), 1.0)
        tl.store(weights + token, weight, mask=token < stop)
        carried += tl.sum(score, 0)
    tl.store(means + sequence, carried / tl.maximum((stop - first).to(tl.float32), 1.0))


def token_weights(scores: Tensor, cu_seqlens: Tensor, right: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """As `reference`, by the backend of the device; sums in fp32 or better whatever the dtype of the scores."""
    scores, cu_seqlens, right = scores.detach().contiguous(), cu_seqlens.long().contiguous(), right.contiguous()
    served_by = backend.choose(scores)
    if served_by == "native":
        return native.token_weights(scores, cu_seqlens, right, threshold)
    if served_by == "reference" or not len(scores):
        return reference(scores, cu_seqlens, right, threshold)
    weights = torch.empty(len(scores), dtype=torch.float32, device=scores.device)
    means = torch.empty(len(right), dtype=torch.float32, device=scores.device)
    kernel_options = triton_launch.options("token_weights", scores.device)
    weights_kernel[(len(right),)](
        scores, cu_seqlens, right.to(torch.uint8), weights, means, threshold, **kernel_options
    )
    return weights, means
