"""Fused operations of OREAL training: language-model heads, token weights and losses. Imports torch and triton only.

Each module holds one operation in the order reference, kernel, autograd, public function. A reference is plain torch:
the same mathematics on one rank, without arguments that concern groups, memory or buffers. Triton kernels serve GPUs,
the native library (kernels/csrc) CPUs, the references everything else.
"""

from oreal_kernels.hidden_to_logprob import linear_logprob
from oreal_kernels.hidden_to_loss import OrealLossResult, linear_oreal_loss
from oreal_kernels.importance import truncated_ratio
from oreal_kernels.logits_to_logprob import logprob_from_logits
from oreal_kernels.policy_loss import KL_KINDS, SUMS, LossTerms, oreal_loss
from oreal_kernels.prefix_reward_loss import prefix_reward_loss
from oreal_kernels.reward_model_loss import reward_loss
from oreal_kernels.rotary import rotary
from oreal_kernels.scores_to_weights import token_weights

__version__ = "0.2.0"
__all__ = [
    "KL_KINDS", "SUMS", "LossTerms", "OrealLossResult", "linear_logprob", "linear_oreal_loss", "logprob_from_logits",
    "oreal_loss", "prefix_reward_loss", "reward_loss", "rotary",
    "token_weights",
    "truncated_ratio",
]  # fmt: skip
