"""Fused operations of OREAL training: language-model heads, token weights and losses. Imports torch and triton only.

Each file holds one operation in the order reference, kernel, autograd, public function. References are plain torch: the
same mathematics on one rank, without what only says how (groups, memory, buffers). Triton serves GPUs, the native
library (kernels/csrc) CPUs, the references everything else.
"""

from oreal_kernels.linear_logprob import linear_logprob
from oreal_kernels.linear_oreal_loss import linear_oreal_loss
from oreal_kernels.logprob_from_logits import logprob_from_logits
from oreal_kernels.oreal_loss import KL_KINDS, SUMS, Terms, oreal_loss
from oreal_kernels.reward_loss import reward_loss
from oreal_kernels.token_weights import token_weights

__all__ = [
    "KL_KINDS", "SUMS", "Terms", "linear_logprob", "linear_oreal_loss", "logprob_from_logits", "oreal_loss",
    "reward_loss", "token_weights",
]  # fmt: skip
