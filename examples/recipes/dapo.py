"""DAPO (arXiv 2503.14476) from extension points, on the addition task: a baseline beside OREAL.

    oreal --processes 2 train examples/recipes/dapo.py:dapo

Beside GRPO: a higher upper clip, a mean over all tokens of the step, no KL divergence, prompts with equal rewards are
left out, and generation continues until enough prompts have both outcomes (dynamic sampling). Truncated responses get
a lower reward. Needs the inputs of examples/addition.sh. See docs/how_to/own_loss.md.
"""

import dataclasses

from addition import FOLDER
from grpo import UPDATES, advantage, clipped, grpo

from oreal_megatron.config import Config, LossConfig, PenaltyConfig, RolloutConfig, SelectionConfig

CLIP_LOW, CLIP_HIGH = 0.2, 0.28


def loss_term(logp_T, tokens, counts):
    """Return the mean over all tokens of the step, and the clipped share of tokens."""
    gain_T, clipped_T = clipped(logp_T, tokens, CLIP_LOW, CLIP_HIGH)
    return -gain_T.sum() / counts.action_tokens, {"clipped_share": clipped_T.sum() / counts.action_tokens}


def dapo() -> Config:
    """Return DAPO with four updates a step."""
    return dataclasses.replace(
        grpo(),
        run=f"{FOLDER}/dapo",
        rollout=RolloutConfig(round_tokens=16, pool=2.0, enough="mixed", carry=False),
        selection=SelectionConfig(
            advantage_rule=advantage, keep="mixed", penalties=PenaltyConfig(overlong=True, reward=-2.0)
        ),
        loss=LossConfig(positive_coef=0, negative_coef=0, kl_coef=0, term=loss_term, **UPDATES),
    )
