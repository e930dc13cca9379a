"""Token weights from the token-level reward model's scores, for packed sequences (cu_seqlens).

The belief that a response is correct is the sigmoid of its scores' mean up to the token (`prefix_mean`, the authors'
code) or of the token's own score (`token`, Eq. 10 of arXiv 2502.06781 as printed). Tokens of correct responses are
weighted by it, those of incorrect ones by its complement, and a threshold maps [threshold, 1] to [0, 1]: 0.5 gives
max(2 sigmoid(w) - 1, 0) and max(1 - 2 sigmoid(w), 0).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oreal_kernels import backend, input_checks, native, triton_launch

BELIEFS = ("prefix_mean", "token")


def sequence_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the number [T] of the sequence of each token."""
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)


def reference(
    scores: Tensor,  # [T]
    cu_seqlens: Tensor,  # [B + 1] int64, from 0 to T
    correct: Tensor,  # [B] bool
    thresholds: tuple[float, float],  # in [0, 1), of correct and of incorrect sequences
    belief: str = "prefix_mean",  # one of BELIEFS
) -> tuple[Tensor, Tensor]:
    """Compute weights and mean scores in plain torch, see `token_weights`."""
    length = cu_seqlens.diff()
    owner = sequence_of_token(cu_seqlens, len(scores))
    total = torch.cat([scores.new_zeros(1, dtype=torch.float64), scores.detach().double().cumsum(0)])
    before = total[cu_seqlens[:-1]]  # [B]
    position = torch.arange(len(scores), device=scores.device) - cu_seqlens[owner] + 1  # from 1
    value = (total[1:] - before[owner]) / position if belief == "prefix_mean" else scores.detach().double()
    is_correct = correct[owner]
    merit = torch.sigmoid(torch.where(is_correct, value, -value))
    threshold = merit.new_tensor(thresholds)[(~is_correct).long()]
    weight = ((merit - threshold) / (1 - threshold)).clamp(0, 1)
    mean = (total[cu_seqlens[1:]] - before) / length.clamp(min=1)
    return weight.float(), mean.float()


@triton.jit
def weights_kernel(
    scores, cu_seqlens, correct, weights, means, threshold_correct, threshold_incorrect,
    PREFIX_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scan one sequence per program; a micro-batch has few, and 14k tokens are 14 blocks."""
    sequence = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_seqlens + sequence)
    stop = tl.load(cu_seqlens + sequence + 1)
    is_correct = tl.load(correct + sequence) != 0
    sign = tl.where(is_correct, 1.0, -1.0)
    threshold = tl.where(is_correct, threshold_correct, threshold_incorrect)
    sum_before = tl.full((), 0.0, tl.float32)
    for start in range(first, stop, BLOCK):
        token = start + tl.arange(0, BLOCK)
        score = tl.load(scores + token, mask=token < stop, other=0.0).to(tl.float32)
        if PREFIX_MEAN:
            value = (sum_before + tl.cumsum(score, 0)) / (token - first + 1).to(tl.float32)
        else:
            value = score
        belief = 1.0 / (1.0 + tl.exp(-sign * value))
        weight = tl.minimum(tl.maximum((belief - threshold) / (1.0 - threshold), 0.0), 1.0)
        tl.store(weights + token, weight, mask=token < stop)
        sum_before += tl.sum(score, 0)
    tl.store(means + sequence, sum_before / tl.maximum((stop - first).to(tl.float32), 1.0))


def token_weights(
    scores: Tensor,
    cu_seqlens: Tensor,
    correct: Tensor,
    thresholds: tuple[float, float],
    belief: str = "prefix_mean",
) -> tuple[Tensor, Tensor]:
    """Compute token weights and mean scores of B packed sequences; not differentiable.

    Args:
        scores: [T] token scores, fp32 or bf16; sums are in fp32 or better.
        cu_seqlens: [B + 1] integers, cumulative lengths of the sequences, from 0 to T.
        correct: [B] bool, outcome of each sequence.
        thresholds: beliefs in [0, 1) that get weight 0, in correct and in incorrect sequences; 0 keeps all beliefs.
        belief: "prefix_mean" or "token": the sigmoid of the scores' mean up to the token, or of the token's score.

    Returns:
        Weights [T] in [0, 1] and the mean score [B] of each sequence (0 for an empty one), fp32.

    Raises:
        ValueError: a threshold is not below 1, belief is unknown, shapes do not fit or cu_seqlens does not rise from 0
            to T (on a GPU at a later call).
    """
    native.check_thresholds(thresholds)
    if belief not in BELIEFS:
        raise ValueError(f"belief is {belief!r}; expected one of {', '.join(BELIEFS)}")
    input_checks.check_length("correct", correct, input_checks.check_offsets(cu_seqlens, len(scores)))
    scores, cu_seqlens, correct = scores.detach().contiguous(), cu_seqlens.long().contiguous(), correct.contiguous()
    served_by = backend.choose(scores)
    if served_by == "native":
        return native.token_weights(scores, cu_seqlens, correct, thresholds, belief == "prefix_mean")
    if served_by == "reference" or not len(scores):
        return reference(scores, cu_seqlens, correct, thresholds, belief)
    weights = torch.empty(len(scores), dtype=torch.float32, device=scores.device)
    means = torch.empty(len(correct), dtype=torch.float32, device=scores.device)
    kernel_options = triton_launch.options("token_weights", scores.device)
    weights_kernel[(len(correct),)](
        scores, cu_seqlens, correct.to(torch.uint8), weights, means, *thresholds,
        PREFIX_MEAN=belief == "prefix_mean", **kernel_options,
    )  # fmt: skip
    return weights, means
