"""Token weights from the token-level reward model's scores (arXiv 2502.06781, Eq. 10)."""

from __future__ import annotations

import oreal_kernels
import torch
from torch import Tensor

from oreal_megatron.config import WeightsConfig
from oreal_megatron.records import Counts, MicroBatch


def importance(score_T: Tensor, micro_batch: MicroBatch, config: WeightsConfig) -> Tensor:
    """Return weights [T] in [0, 1], detached.

    The belief that the response is correct is sigmoid(mean of the scores up to the token), or with belief="token"
    sigmoid(score of the token). Tokens of correct responses are weighted by it, those of incorrect ones by its
    complement. The side's threshold maps [threshold, 1] to [0, 1] and lower values to 0: with 0.5 that is
    max(2 sigmoid(w) - 1, 0) and max(1 - 2 sigmoid(w), 0) of Eq. 10.
    """
    by_threshold = config.rescale == "threshold"
    correct = micro_batch.reward > 0
    thresholds = (config.threshold_correct, config.threshold_incorrect) if by_threshold else (0.0, 0.0)
    weight_T, _ = oreal_kernels.token_weights(score_T, micro_batch.action_offsets, correct, thresholds, config.belief)
    return weight_T if by_threshold else _weigh_top_share(weight_T, micro_batch.action_offsets, config.top_share)


def metrics(weight_T: Tensor, micro_batch: MicroBatch, counts: Counts) -> dict[str, Tensor]:
    """Return mean token weights and shares of tokens with weight 0, by outcome; they add up over micro-batches."""
    lengths = micro_batch.action_offsets.diff()
    correct_T = torch.repeat_interleave(micro_batch.reward > 0, lengths, output_size=len(weight_T))
    sums: dict[str, Tensor] = {}
    sides = (("correct", correct_T, counts.correct_tokens), ("incorrect", ~correct_T, counts.incorrect_tokens))
    for side, own_T, tokens in sides:
        sums[f"weights/{side}_mean"] = (weight_T * own_T).sum() / max(tokens, 1)
        sums[f"weights/{side}_zero_share"] = ((weight_T == 0) & own_T).sum() / max(tokens, 1)
    return sums


def _weigh_top_share(merit_T: Tensor, action_offsets: Tensor, share: float) -> Tensor:
    """Map the best `share` of each sequence's tokens to [0, 1] (all to 1 when they are equal), the others to 0."""
    weight_T = torch.zeros_like(merit_T)
    for start, stop in zip(action_offsets[:-1].tolist(), action_offsets[1:].tolist(), strict=True):
        top, index = torch.topk(merit_T[start:stop], int((stop - start) * share))
        if len(top):
            spread = top.max() - top.min()
            weight_T[start + index] = (top - top.min()) / spread if spread > 0 else torch.ones_like(top)
    return weight_T
