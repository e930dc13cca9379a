"""Importance ratios of tokens that were not sampled from the policy as the trainer computes it.

The engine's log-probs differ from the trainer's by rounding, and by whole updates where a response was sampled under
older weights. With `loss.ratio_cap` the incorrect samples' term weights each token by min(exp(trainer - engine), cap).
Correct samples are imitated: their term is the likelihood of verified responses, which no sampling distribution enters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from oreal_kernels import truncated_ratio
from torch import Tensor

from oreal_megatron.config import LossConfig, RunStopped
from oreal_megatron.records import MicroBatch, Rollout

__all__ = ["MissingLogprobs", "behaviour_logp", "metrics", "require_logprobs", "truncated_ratio"]


class MissingLogprobs(RunStopped):
    """Rollouts of the step lack the engine's log-probs that their importance ratios need."""


def require_logprobs(rollouts: Sequence[Sequence[Rollout]], step: int) -> None:
    """Raise MissingLogprobs where a rollout lacks the engine's log-prob of a token."""
    everything = [rollout for row in rollouts for rollout in row]
    missing = [rollout for rollout in everything if len(rollout.logprobs or ()) != len(rollout.tokens)]
    if missing:
        raise MissingLogprobs(
            f"step {step}: {len(missing)} of {len(everything)} rollouts, the first of them prompt {missing[0].slot}, "
            f"rollout {missing[0].index}, have no log-probs of the engine for all of their tokens, which "
            "loss.ratio_cap needs. Nothing was trained on them; set loss.ratio_cap=0, or fix the engine and resume"
        )


def behaviour_logp(micro_batch: MicroBatch, config: LossConfig) -> Tensor:
    """Return the log-probs [T] that ratios divide by: the engine's; nan, for a ratio of 1, where none is asked for."""
    if config.ratio_tokens == "all":
        return micro_batch.engine_logprobs
    return micro_batch.engine_logprobs.masked_fill(~micro_batch.carried, math.nan)


def metrics(logp_T: Tensor, micro_batch: MicroBatch, incorrect_tokens: int, config: LossConfig) -> dict[str, Tensor]:
    """Return the mean ratio of the incorrect tokens and the share that the cap truncates; they add up.

    {} if no sample of the update is incorrect.
    """
    if not incorrect_tokens:
        return {}
    ratio_T = truncated_ratio(logp_T, behaviour_logp(micro_batch, config), config.ratio_cap)
    lengths = micro_batch.action_offsets.diff()
    incorrect_T = torch.repeat_interleave(micro_batch.reward < 0, lengths, output_size=len(ratio_T))
    return {
        "policy/ratio_mean": ratio_T[incorrect_T].sum() / incorrect_tokens,
        "policy/ratio_capped_share": (ratio_T[incorrect_T] >= config.ratio_cap).sum() / incorrect_tokens,
    }
