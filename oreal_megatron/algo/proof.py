"""The cheap proof that engine and trainer are the same policy: their log-probs of some sampled tokens agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oreal_megatron.config import RunStopped
from oreal_megatron.records import Batch, Rollout, Sample


class PoliciesDiffer(RunStopped):
    """Engine and trainer disagree about the policy; training on such answers would be silently wrong."""


def samples(rollouts: Sequence[Sequence[Rollout]], tokens: int) -> list[Sample]:
    """The answers whose engine log-probs were asked for, cut to their first `tokens` tokens."""
    return [
        Sample(rollout.prompt.tokens, rollout.tokens[:tokens], 1.0, 0.0, rollout.logprobs[:tokens])
        for row in rollouts
        for rollout in row
        if rollout.logprobs
    ]


def difference(trainer_logp: Sequence[Tensor] | None, batch: Batch) -> dict[str, float]:
    """Sum of |trainer - engine| in nats and number of tokens on this rank (none before the last pipeline stage)."""
    gaps = [
        (logp_T.cpu() - micro_batch.engine_logprobs).abs()
        for logp_T, micro_batch in zip(trainer_logp or (), batch.micro_batches, strict=trainer_logp is not None)
    ]
    joined = torch.cat(gaps) if gaps else torch.zeros(0)
    return {"sum": float(joined.sum()), "tokens": float(len(joined))}


def check(totals: dict[str, float], tolerance: float, version: int, step: int) -> dict[str, float]:
    """Metrics of the comparison over all ranks; stops the run when the mean gap exceeds the tolerance."""
    gap = totals["sum"] / max(totals["tokens"], 1.0)
    if not gap <= tolerance:  # nan is a disagreement
        raise PoliciesDiffer(
            f"step {step}: engine and trainer log-probs of {totals['tokens']:.0f} sampled tokens differ by "
            f"{gap:.3g} nats on average, more than the tolerance of {tolerance:g}. The engine does not hold the "
            f"policy of version {version}: suspect the weight mapping, the reload, or a stale prefix cache. "
            "Nothing was trained on these answers; resume from the last checkpoint once it is mended"
        )
    return {"proof/logprob_gap": gap, "proof/tokens": totals["tokens"]}
