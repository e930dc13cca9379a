"""GRPO (arXiv 2402.03300) from extension points, on the addition task: a baseline beside OREAL.

    oreal --processes 2 train examples/recipes/grpo.py:grpo

All rollouts of a prompt are trained on, with their normalised advantage, a clipped ratio to the policy before the
step, and a KL divergence from the reference. Needs the inputs of examples/addition.sh. See docs/how_to/own_loss.md.
"""

import dataclasses
import statistics

import torch
from addition import FOLDER, oreal

from oreal_megatron.config import Config, LossConfig, RewardModelConfig, SelectionConfig

CLIP = 0.2
UPDATES = dict(updates_per_step=4, mini_batches=4)  # one of each quarter of a step's prompts


def advantage(rewards: list[float]) -> list[float]:
    """Return (reward - mean) / standard deviation within the group of a prompt."""
    mean, deviation = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(reward - mean) / (deviation + 1e-6) for reward in rewards]


def clipped(logp_T, tokens, low: float, high: float):
    """Return min(r A, clip(r, 1 - low, 1 + high) A) [T], and 1 where the clip takes the gradient."""
    ratio_T = torch.exp(logp_T - tokens.old_logp)
    plain_T, bounded_T = ratio_T * tokens.advantage, ratio_T.clamp(1 - low, 1 + high) * tokens.advantage
    return torch.minimum(plain_T, bounded_T), (bounded_T < plain_T).detach().float()


def loss_term(logp_T, tokens, counts):
    """Return the mean over responses of their mean over tokens, as in the paper, and the clipped share of tokens."""
    gain_T, clipped_T = clipped(logp_T, tokens, CLIP, CLIP)
    loss = -(gain_T / tokens.length).sum() / counts.sequences
    return loss, {"clipped_share": clipped_T.sum() / counts.action_tokens}


def grpo() -> Config:
    """Return GRPO with four updates a step; the built-in KL term stays, the others have coefficient 0."""
    config = oreal()
    return dataclasses.replace(
        config,
        run=f"{FOLDER}/grpo",
        selection=SelectionConfig(advantage_rule=advantage, keep="all"),
        loss=LossConfig(positive_coef=0, negative_coef=0, kl_coef=0.01, term=loss_term, **UPDATES),
        reward_model=RewardModelConfig(enabled=False),
    )
