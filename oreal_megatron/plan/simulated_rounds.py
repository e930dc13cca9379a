"""Generation in rounds (`rollout.round_tokens`), for the rollout simulation."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Sequence

from oreal_megatron.plan.decode_replica import Replica, SimulatedRollout, take_from


def run_round(
    replicas: Sequence[Replica], queues: Sequence[deque[SimulatedRollout]], round_tokens: int, first: bool, start: float
) -> float:
    """Let the oldest rollouts of each replica decode `round_tokens` more; return the end of the slowest replica.

    A replica takes as many as it has slots for. Those that finish within the round leave their slot empty. The first
    round of a step prefills what its rollouts have; later ones find it in the prefix cache.
    """
    for replica, queue in zip(replicas, queues, strict=True):
        replica.now, replica.prefills = start, first
        chosen = list(itertools.islice(queue, replica.cost.slots))
        parts = [dataclasses.replace(r, length=min(r.length, int(r.decoded) + round_tokens)) for r in chosen]
        waiting = deque(parts)
        take = take_from(waiting)
        replica.start_all(take)
        while replica.active:
            replica.finish_next()
            replica.start_all(take)
        for rollout, part in zip(chosen, parts, strict=True):
            rollout.decoded = part.decoded
            rollout.prompt.unfinished -= rollout.finished
    return max(replica.now for replica in replicas)
