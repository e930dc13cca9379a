"""Token weights from the token-level reward model's scores, for packed sequences (cu_seqlens).

The belief that a response is correct is sigmoid(mean of its scores up to the token). Tokens of correct responses are
weighted by it, those of incorrect ones by its complement, and `threshold` maps [threshold, 1] to [0, 1]: at 0.5 that is
Eq. 10 of arXiv 2502.06781.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oreal_kernels import backend, native, triton_launch


def sequence_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the number [T] of the sequence of each token."""
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)


def reference(
    scores: Tensor,  # [T]
    cu_seqlens: Tensor,  # [B + 1] int64, from 0 to T
    correct: Tensor,  # [B] bool
    threshold: float,  # in [0, 1)
) -> tuple[Tensor, Tensor]:
    """Compute weights and mean scores in plain torch, see `token_weights`."""
    length = cu_seqlens.diff()
    owner = sequence_of_token(cu_seqlens, len(scores))
    total = torch.cat([scores.new_zeros(1, dtype=torch.float64), scores.detach().double().cumsum(0)])
    before = total[cu_seqlens[:-1]]  # [B]
    position = torch.arange(len(scores), device=scores.device) - cu_seqlens[owner] + 1  # from 1
    prefix_mean = (total[1:] - before[owner]) / position
    belief = torch.sigmoid(torch.where(correct[owner], prefix_mean, -prefix_mean))
    weight = ((belief - threshold) / (1 - threshold)).clamp(0, 1)
    mean = (total[cu_seqlens[1:]] - before) / length.clamp(min=1)
    return weight.float(), mean.float()


@triton.jit
def weights_kernel(scores, cu_seqlens, correct, weights, means, threshold, BLOCK: tl.constexpr):
    """Scan one sequence per program; a micro-batch has few, and 14k tokens are 14 blocks."""
    sequence = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_seqlens + sequence)
    stop = tl.load(cu_seqlens + sequence + 1)
    sign = tl.where(tl.load(correct + sequence) != 0, 1.0, -1.0)
    sum_before = tl.full((), 0.0, tl.float32)
    for start in range(first, stop, BLOCK):
        token = start + tl.arange(0, BLOCK)
        score = tl.load(scores + token, mask=token < stop, other=0.0).to(tl.float32)
        prefix_mean = (sum_before + tl.cumsum(score, 0)) / (token - first + 1).to(tl.float32)
        belief = 1.0 / (1.0 + tl.exp(-sign * prefix_mean))
        weight = tl.minimum(tl.maximum((belief - threshold) / (1.0 - threshold), 0.0), 1.0)
        tl.store(weights + token, weight, mask=token < stop)
        sum_before += tl.sum(score, 0)
    tl.store(means + sequence, sum_before / tl.maximum((stop - first).to(tl.float32), 1.0))


def token_weights(scores: Tensor, cu_seqlens: Tensor, correct: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Compute token weights and mean scores of B packed sequences; not differentiable.

    Args:
        scores: [T] token scores, fp32 or bf16; sums are in fp32 or better.
        cu_seqlens: [B + 1] integers, cumulative lengths of the sequences, from 0 to T.
        correct: [B] bool, outcome of each sequence.
        threshold: belief in [0, 1) that gets weight 0; 0 leaves the belief as it is.

    Returns:
        Weights [T] in [0, 1] and the mean score [B] of each sequence (0 for an empty one), fp32.

    Raises:
        ValueError: threshold is not below 1, shapes do not fit or cu_seqlens does not rise from 0 to T (the last two
            are checked by the native library only).
    """
    if not threshold < 1:
        raise ValueError(f"threshold is {threshold}; expected a number below 1: beliefs are divided by 1 - threshold")
    scores, cu_seqlens, correct = scores.detach().contiguous(), cu_seqlens.long().contiguous(), correct.contiguous()
    served_by = backend.choose(scores)
    if served_by == "native":
        return native.token_weights(scores, cu_seqlens, correct, threshold)
    if served_by == "reference" or not len(scores):
        return reference(scores, cu_seqlens, correct, threshold)
    weights = torch.empty(len(scores), dtype=torch.float32, device=scores.device)
    means = torch.empty(len(correct), dtype=torch.float32, device=scores.device)
    kernel_options = triton_launch.options("token_weights", scores.device)
    weights_kernel[(len(correct),)](
        scores, cu_seqlens, correct.to(torch.uint8), weights, means, threshold, **kernel_options
    )
    return weights, means
