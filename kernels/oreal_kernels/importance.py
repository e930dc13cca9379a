"""Truncated importance ratio of tokens that another distribution than the policy's sampled; plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def truncated_ratio(logp: Tensor, behaviour_logp: Tensor, cap: float) -> Tensor:
    """Compute min(exp(logp - behaviour_logp), cap), as V-trace does (arXiv 1802.01561, section 4.1).

    It weights the gradient of a token that `behaviour_logp` sampled as if the policy had sampled it, up to a bias from
    the cap, which bounds the variance. The cap acts on the exponent, so that no exp overflows.

    Args:
        logp: [T] log-probs of the policy, nats.
        behaviour_logp: [T] log-probs of the distribution that sampled the tokens, nats; nan: the policy itself.
        cap: largest ratio, at least 1.

    Returns:
        [T] ratios in [0, cap], detached, at least fp32; 1 where behaviour_logp is nan.

    Raises:
        ValueError: cap is below 1, so that tokens which need no correction would be scaled.
    """
    if not cap >= 1:
        raise ValueError(f"the cap of the importance ratio is {cap}; expected at least 1")
    wide = torch.promote_types(logp.dtype, torch.float32)
    distance = logp.detach().to(wide) - behaviour_logp.detach().to(wide)
    return distance.masked_fill(behaviour_logp.isnan(), 0.0).clamp(max=math.log(cap)).exp()
