"""KL divergence from the reference in the reward, centred over the other rollouts of a prompt (T1, arXiv 2501.11651).

    A_i <- A_i - reward_kl_coef (KL_i - mean_{j != i} KL_j)          KL_i = sum_t log pi(a_t) - log reference(a_t)

With leave-one-out advantages this equals the advantage of the reward r_i - reward_kl_coef KL_i. The mean is over the
samples of the prompt, so all its rollouts must be samples (selection.keep other than "pair").
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

from oreal_kernels.policy_loss import MAX_DISTANCE
from torch import Tensor

from oreal_megatron.algo import packing
from oreal_megatron.algo.advantages import leave_one_out
from oreal_megatron.algo.packing import RolloutKey
from oreal_megatron.records import Batch, MicroBatch


def response_kls(
    logp: Sequence[Tensor], reference_logp: Sequence[Tensor], micro_batches: Sequence[MicroBatch]
) -> dict[RolloutKey, float]:
    """Return the KL estimate of each sequence in nats, by its rollout; a token counts for at most MAX_DISTANCE."""
    gaps = [
        (logp_T - reference_T).double().clamp(-MAX_DISTANCE, MAX_DISTANCE)
        for logp_T, reference_T in zip(logp, reference_logp, strict=bool(logp))
    ]
    return packing.sums_by_rollout(gaps, micro_batches)


def centre(kls: Mapping[RolloutKey, float]) -> dict[RolloutKey, float]:
    """Return each rollout's KL minus the mean of the others of its prompt; 0 for a single one."""
    prompts: dict[int, list[RolloutKey]] = defaultdict(list)
    for key in sorted(kls):
        prompts[key[0]].append(key)
    centred: dict[RolloutKey, float] = {}
    for keys in prompts.values():
        centred |= dict(zip(keys, leave_one_out([kls[key] for key in keys]), strict=True))
    return centred


def with_kl_in_advantages(batch: Batch, centred: Mapping[RolloutKey, float], coefficient: float) -> Batch:
    """Return the batch with advantages lowered by the centred KLs of its sequences."""

    def lowered(micro_batch: MicroBatch) -> MicroBatch:
        kl_B = [centred.get((slot, index), 0.0) for slot, index in micro_batch.rollouts.tolist()]
        advantage = micro_batch.advantage.double()
        lowered_B = advantage - coefficient * advantage.new_tensor(kl_B)
        return dataclasses.replace(micro_batch, advantage=lowered_B.float())

    return dataclasses.replace(batch, micro_batches=tuple(map(lowered, batch.micro_batches)))
