"""The cheap proof that engine and trainer are the same policy: their log-probs of some sampled tokens agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oreal_megatron.config import RunStopped
from oreal_megatron.records import Batch, Rollout, Sample

CAP = 4  # tolerances, at which the gap of a single token is cut off: a quarter of an answer must be off to stop a run


class LogprobMismatch(RunStopped):
    """Engine and trainer disagree about the policy; training on such answers would be silently wrong."""


def samples(rollouts: Sequence[Sequence[Rollout]], tokens: int) -> list[Sample]:
    """The answers whose engine log-probs were asked for, cut to their first `tokens` tokens."""
    return [
        Sample(rollout.prompt.tokens, rollout.tokens[:tokens], 1.0, 0.0, rollout.logprobs[:tokens])
        for row in rollouts
        for rollout in row
        if rollout.logprobs
    ]


def difference(trainer_logp: Sequence[Tensor] | None, batch: Batch, tolerance: float) -> tuple[float, float, int]:
    """The worst answer's mean |trainer - engine| in nats, the same with tokens capped at CAP tolerances, and the tokens
    compared, on this rank (zeros before the last pipeline stage).

    The worst, because one bad replica among many good ones would drown in a mean. Capped, because in half precision
    single tokens are off by whole nats where nothing is wrong: after a slip in a sum, rounding the weights alone moved
    one by 1.5 (docs/evidence/learning.md). Wrong weights and stale caches move many.
    """
    gaps, capped, tokens = [torch.zeros(1)], [torch.zeros(1)], 0
    for logp_T, micro_batch in zip(trainer_logp or (), batch.micro_batches, strict=trainer_logp is not None):
        gap_T = (logp_T.cpu() - micro_batch.engine_logprobs).abs().nan_to_num(torch.inf)
        gaps.append(_mean(gap_T, micro_batch.action_offsets))
        capped.append(_mean(gap_T.clamp(max=CAP * tolerance), micro_batch.action_offsets))
        tokens += len(gap_T)
    return torch.cat(gaps).max().item(), torch.cat(capped).max().item(), tokens


def _mean(values_T: Tensor, action_offsets: Tensor) -> Tensor:
    """[B] mean over each sequence; 0 for an empty one."""
    count = action_offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(count)), count)
    return torch.zeros(len(count), dtype=values_T.dtype).index_add(0, owner, values_T) / count.clamp(min=1)


def check_versions(rollouts: Sequence[Sequence[Rollout]], engine: int, trainer: int, step: int) -> None:
    """Stop the run when the engine, or an answer that would be trained on, is of another version than the policy."""
    if engine != trainer:
        raise LogprobMismatch(f"step {step}: the engine holds policy version {engine}, the trainer is at {trainer}")
    old = [rollout for row in rollouts for rollout in row if rollout.version != trainer]
    if old:
        raise LogprobMismatch(
            f"step {step}: {len(old)} answers were not sampled from policy version {trainer}, the first (prompt "
            f"{old[0].slot}, answer {old[0].index}) from version {old[0].version}; the loss is for answers of the "
            "policy that is trained, so nothing was trained on them"
        )


def check(found: Sequence[tuple[float, float, int]], tolerance: float, version: int, step: int) -> dict[str, float]:
    """Metrics of all ranks' `difference`; stops the run when the capped gap exceeds the tolerance."""
    gaps, capped, counts = zip(*found, strict=True)
    gap, tokens = max(gaps), sum(counts)
    if max(capped) > tolerance:
        raise LogprobMismatch(
            f"step {step}: engine and trainer log-probs differ by {gap:.3g} nats on average in one of the sampled "
            f"answers ({tokens} tokens compared), more than the tolerance of {tolerance:g}. The engine does not hold "
            f"the policy of version {version}: suspect the weight mapping, the reload, or a stale prefix cache. "
            "Nothing was trained on these answers; resume from the last checkpoint once it is mended"
        )
    return {"parity/logprob_gap": gap, "parity/capped_gap": max(capped), "parity/tokens": tokens}
