"""Token weights from the token-level reward model's scores (arXiv 2502.06781, Eq. 10)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import oreal_kernels
import torch
from torch import Tensor

from oreal_megatron.config import Config, RunStopped, WeightsConfig
from oreal_megatron.config.user_functions import read_function
from oreal_megatron.records import Batch, Counts, MicroBatch

# Scores [T] of a micro-batch's action tokens (0 without a reward model), the micro-batch, the configuration -> weights.
WeightRule = Callable[[Tensor, MicroBatch, Config], Tensor]


def weight_rule(config: Config) -> WeightRule:
    """Return the rule that makes token weights from scores: `weights.rule`, or `importance` without one.

    Raises ConfigError where `weights.rule` names no function of three arguments.
    """
    if not config.weights.rule:
        return lambda score_T, micro_batch, config: importance(score_T, micro_batch, config.weights)
    rule = read_function(config.weights.rule, "weights.rule", ("score_T", "micro_batch", "config"))

    def checked_rule(score_T: Tensor, micro_batch: MicroBatch, config: Config) -> Tensor:
        return _check_weights(rule(score_T.detach(), micro_batch, config), score_T, config.weights.rule)

    return checked_rule


def _check_weights(weight_T: Tensor, score_T: Tensor, rule: str) -> Tensor:
    """Return the weights in fp32 beside the scores; raise RunStopped where they are not one number per token."""
    if not isinstance(weight_T, Tensor) or weight_T.shape != score_T.shape:
        returned = f"shape {list(weight_T.shape)}" if isinstance(weight_T, Tensor) else type(weight_T).__name__
        raise RunStopped(f"weights.rule {rule} returned {returned}; expected a tensor of shape {list(score_T.shape)}")
    weight_T = weight_T.detach().to(score_T.device, torch.float32)
    if not (weight_T.isfinite() & (weight_T >= 0)).all():
        raise RunStopped(f"weights.rule {rule} returned weights that are negative or not finite; expected 0 to 1")
    return weight_T


def importance(score_T: Tensor, micro_batch: MicroBatch, config: WeightsConfig) -> Tensor:
    """Return weights [T] in [0, 1], detached.

    The belief that the response is correct is sigmoid(mean of the scores up to the token), or with belief="token"
    sigmoid(score of the token). Tokens of correct responses are weighted by it, those of incorrect ones by its
    complement. The side's threshold maps [threshold, 1] to [0, 1] and lower values to 0: with 0.5 that is
    max(2 sigmoid(w) - 1, 0) and max(1 - 2 sigmoid(w), 0) of Eq. 10.

    With credit="difference" (1 + d) / 2 takes the belief's place, where d is the change of the belief in the outcome
    that the token makes: with a threshold of 0.5 the weight is max(d, 0). Before the first token the belief is 0.5.
    """
    by_threshold = config.rescale == "threshold"
    correct = micro_batch.reward > 0
    thresholds = (config.threshold_correct, config.threshold_incorrect) if by_threshold else (0.0, 0.0)
    if config.credit == "difference":
        weight_T = _weigh_changes(score_T, micro_batch, thresholds, config.belief)
    else:
        weight_T, _ = oreal_kernels.token_weights(
            score_T, micro_batch.action_offsets, correct, thresholds, config.belief
        )
    return weight_T if by_threshold else _weigh_top_share(weight_T, micro_batch.action_offsets, config.top_share)


def _weigh_changes(score_T: Tensor, micro_batch: MicroBatch, thresholds: tuple[float, float], belief: str) -> Tensor:
    """Return weights from the change of belief at each token: temporal differences of prefix values."""
    offsets, correct = micro_batch.action_offsets, micro_batch.reward > 0
    value_T, _ = oreal_kernels.token_weights(score_T, offsets, torch.ones_like(correct), (0.0, 0.0), belief)
    before_T = torch.cat([value_T.new_full((1,), 0.5), value_T])[: len(value_T)]
    lengths = offsets.diff()
    before_T[offsets[:-1][lengths > 0]] = 0.5
    correct_T = torch.repeat_interleave(correct, lengths, output_size=len(value_T))
    change_T = torch.where(correct_T, value_T - before_T, before_T - value_T)
    threshold_T = torch.where(correct_T, *thresholds)
    return (((1 + change_T) / 2 - threshold_T) / (1 - threshold_T)).clamp(0, 1)


def metrics(weight_T: Tensor, micro_batch: MicroBatch, counts: Counts) -> dict[str, Tensor]:
    """Return mean token weights and shares of tokens with weight 0, by outcome; they add up over micro-batches.

    Those of an outcome without tokens in the step are absent.
    """
    lengths = micro_batch.action_offsets.diff()
    correct_T = torch.repeat_interleave(micro_batch.reward > 0, lengths, output_size=len(weight_T))
    sums: dict[str, Tensor] = {}
    sides = (("correct", correct_T, counts.correct_tokens), ("incorrect", ~correct_T, counts.incorrect_tokens))
    for side, own_T, tokens in sides:
        if tokens:
            sums[f"weights/{side}_mean"] = (weight_T * own_T).sum() / tokens
            sums[f"weights/{side}_zero_share"] = ((weight_T == 0) & own_T).sum() / tokens
    return sums


def _weigh_top_share(merit_T: Tensor, action_offsets: Tensor, share: float) -> Tensor:
    """Map the best `share` of each sequence's tokens to [0, 1] (all to 1 when they are equal), the others to 0.

    At least one token of a sequence counts, however short it is.
    """
    weight_T = torch.zeros_like(merit_T)
    for start, stop in zip(action_offsets[:-1].tolist(), action_offsets[1:].tolist(), strict=True):
        if stop > start:
            top, index = torch.topk(merit_T[start:stop], max(int((stop - start) * share), 1))
            spread = top.max() - top.min()
            weight_T[start + index] = (top - top.min()) / spread if spread > 0 else torch.ones_like(top)
    return weight_T


def shuffle(weights: Sequence[Tensor], batch: Batch, seed: tuple[int, ...]) -> list[Tensor]:
    """Permute a rank's weights at random among its tokens of correct responses, and among those of incorrect ones.

    The control for where weights lie: each side keeps its weights, and so their sum. `seed` must be equal on ranks that
    hold the same micro-batches, and differ between steps.
    """
    weight_T = torch.cat(list(weights))
    correct_T = torch.cat(
        [(part.reward > 0).repeat_interleave(part.action_offsets.diff()) for part in batch.micro_batches]
    )
    generator = torch.Generator().manual_seed(random.Random(f"weights {seed}").getrandbits(63))
    permuted_T = weight_T.clone()
    for side_T in (correct_T, ~correct_T):
        index = side_T.nonzero().flatten()
        source = index[torch.randperm(len(index), generator=generator)]
        permuted_T[index.to(weight_T.device)] = weight_T[source.to(weight_T.device)]
    return list(permuted_T.split([len(part) for part in weights]))
