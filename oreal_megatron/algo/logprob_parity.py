"""Logprob parity check: engine and trainer must agree on the log-probs of some sampled tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oreal_megatron.config import EngineConfig, RunStopped
from oreal_megatron.records import Batch, Rollout, Sample

# In tolerances. The gap of one token is clamped to it, so that a quarter of a response must differ to stop a run.
TOKEN_CAP = 4


class LogprobMismatch(RunStopped):
    """Engine and trainer hold different policies; training on such rollouts would be silently wrong."""


class NonFiniteLogprobs(RunStopped):
    """Log-probs of the policy or the engine are NaN or infinite."""


def is_checked(slot: int, index: int, config: EngineConfig, replicas: int) -> bool:
    """Choose the rollouts of the check: the first one of the first `parity_rollouts` prompts of every replica."""
    return index == 0 and slot // replicas < config.parity_rollouts  # Rollout.replica


def samples(rollouts: Sequence[Sequence[Rollout]], config: EngineConfig, replicas: int) -> list[Sample]:
    """Return of each replica the first `parity_rollouts` rollouts that have engine log-probs, for the comparison.

    Of each, the first `parity_tokens` tokens that the policy itself sampled; those that earlier versions wrote are read
    as part of the prompt.
    """
    room = dict.fromkeys(range(replicas), config.parity_rollouts)
    chosen = []
    for rollout in sorted((rollout for row in rollouts for rollout in row), key=lambda rollout: rollout.index):
        replica, start = rollout.replica(replicas), rollout.carried
        compared = slice(start, start + config.parity_tokens)
        if rollout.logprobs and rollout.tokens[compared] and room[replica]:
            room[replica] -= 1
            context = rollout.prompt.tokens + rollout.tokens[:start]
            chosen.append(Sample(context, rollout.tokens[compared], 1.0, 0.0, rollout.logprobs[compared]))
    return chosen


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference of log-probs on one rank, in nats."""

    worst_gap: float  # largest mean |trainer - engine| of a response
    worst_capped_gap: float  # the same with tokens clamped to TOKEN_CAP tolerances
    tokens: Tensor  # trainer - engine of each token compared; empty before the last pipeline stage


def difference(trainer_logp: Sequence[Tensor] | None, batch: Batch, tolerance: float) -> Difference:
    """Compare log-probs on this rank; zeros before the last pipeline stage.

    The worst response counts, because one faulty replica among many would vanish in a mean. Tokens are clamped, because
    in half precision single tokens differ by whole nats without a fault: rounding the weights alone moved one by 1.5
    (docs/evidence/learning.md). Wrong weights and stale caches move many tokens.
    """
    gaps, capped, tokens = [torch.zeros(1)], [torch.zeros(1)], [torch.zeros(0)]
    for logp_T, micro_batch in zip(trainer_logp or (), batch.micro_batches, strict=trainer_logp is not None):
        difference_T = logp_T.cpu().float() - micro_batch.engine_logprobs
        gap_T = difference_T.abs().nan_to_num(torch.inf)
        gaps.append(_sequence_means(gap_T, micro_batch.action_offsets))
        capped.append(_sequence_means(gap_T.clamp(max=TOKEN_CAP * tolerance), micro_batch.action_offsets))
        tokens.append(difference_T)
    return Difference(torch.cat(gaps).max().item(), torch.cat(capped).max().item(), torch.cat(tokens))


def _sequence_means(values_T: Tensor, action_offsets: Tensor) -> Tensor:
    """Return the mean [B] over each sequence; 0 for an empty one."""
    count = action_offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(count)), count)
    return torch.zeros(len(count), dtype=values_T.dtype).index_add(0, owner, values_T) / count.clamp(min=1)


def check_versions(
    rollouts: Sequence[Sequence[Rollout]], engine: int, trainer: int, step: int, version_limit: int = 0
) -> None:
    """Raise LogprobMismatch where the engine has another version than the policy, or a rollout a too old or newer one.

    `version_limit`: most versions between the first token of a rollout and the policy.
    """
    if engine != trainer:
        raise LogprobMismatch(f"step {step}: the engine holds policy version {engine}, the trainer is at {trainer}")
    outdated = [
        rollout
        for row in rollouts
        for rollout in row
        if not trainer - version_limit <= rollout.oldest_version <= rollout.version <= trainer
    ]
    if outdated:
        first = outdated[0]
        allowed = f"version {trainer}" if not version_limit else f"versions {trainer - version_limit} to {trainer}"
        raise LogprobMismatch(
            f"step {step}: {len(outdated)} rollouts were not sampled from policy {allowed}, the first (prompt "
            f"{first.slot}, rollout {first.index}) from version {first.oldest_version}; the loss is for "
            "rollouts of the policy that is trained, so nothing was trained on them"
        )


def check(differences: Sequence[Difference], tolerance: float, version: int, step: int) -> dict[str, float]:
    """Return metrics of all ranks' `difference`; raise LogprobMismatch where the clamped gap exceeds the tolerance."""
    gap, capped = max(d.worst_gap for d in differences), max(d.worst_capped_gap for d in differences)
    tokens = torch.cat([d.tokens for d in differences])
    if capped > tolerance:
        raise LogprobMismatch(
            f"step {step}: engine and trainer log-probs differ by {gap:.3g} nats on average in one of the sampled "
            f"responses ({len(tokens)} tokens compared), more than the tolerance of {tolerance:g}. The engine does not "
            f"hold the policy of version {version}: check the weight mapping, the weight sync and the prefix cache. "
            "Nothing was trained on these rollouts; resume from the last checkpoint once the cause is fixed"
        )
    own = {"parity/logprob_gap": gap, "parity/capped_gap": capped, "parity/tokens": len(tokens)}
    return own | mismatch_metrics(tokens)


def mismatch_metrics(difference_T: Tensor) -> dict[str, float]:
    """Return mean, 99th percentile (nearest rank) and maximum of |trainer - engine|, and k3 = exp(d) - d - 1, in nats.

    The mean of k3 over tokens that the engine sampled estimates KL(engine || trainer). All are 0 without tokens.
    """
    d = difference_T.double() if len(difference_T) else torch.zeros(1, dtype=torch.float64)
    gap = d.abs()
    return {
        "parity/token_gap_mean": gap.mean().item(),
        "parity/token_gap_p99": gap.kthvalue(math.ceil(0.99 * len(gap))).values.item(),
        "parity/token_gap_max": gap.max().item(),
        "parity/kl_k3": (torch.expm1(d) - d).mean().item(),
    }


def is_finite(differences: Sequence[Difference]) -> bool:
    """Return whether all ranks' differences are numbers: log-probs of both sides are finite."""
    return all(math.isfinite(difference.worst_gap) for difference in differences)


def refuse_non_finite(causes: Sequence[str], version: int, step: int) -> None:
    """Raise NonFiniteLogprobs. `causes`: each rank's description of its first value that is not finite."""
    places = "; ".join(f"rank {rank}: {cause}" for rank, cause in enumerate(causes) if cause)
    if not places:
        raise NonFiniteLogprobs(
            f"step {step}: the engine's log-probs are not finite, those of the trainer are. The engine's precision may "
            "be too small for this policy (engine.dtype), or its weights are damaged. Nothing was trained on these "
            "rollouts; resume from the last checkpoint"
        )
    raise NonFiniteLogprobs(
        f"step {step}: log-probs of policy version {version} are not finite ({places}). The policy has diverged, or "
        "its weights are damaged. Nothing was trained on these rollouts; resume from a checkpoint before it, with a "
        "lower learning rate or clip_grad"
    )
