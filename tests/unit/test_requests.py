"""Requests to the engine: every rollout is generated once, and every prompt's rollouts are spread over the replicas."""

from __future__ import annotations

from collections import Counter

import pytest

from oreal_megatron.records import Prompt
from oreal_megatron.rollout import growth, requests


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize(("prompts", "per_prompt"), [(1, 1), (5, 3), (8, 16), (7, 8)])
def test_every_rollout_has_one_replica_and_no_replica_gets_many_of_a_prompt(prompts, per_prompt, replicas):
    rollouts = growth.blank_rollouts([Prompt(number, "", "", None, (1,)) for number in range(prompts)], per_prompt)
    shares = [[r.key for r in rollouts if r.replica(replicas) == replica] for replica in range(replicas)]
    sizes = [len(share) for share in shares]
    assert sum(sizes) == len(rollouts) and max(sizes) - min(sizes) <= max(1, replicas - 1)
    for share in shares:
        of_prompt = Counter(slot for slot, _ in share).values()
        assert max(of_prompt, default=0) <= -(-per_prompt // replicas)
    assert all((slot, 0) in shares[slot % replicas] for slot in range(prompts)), "the parity check counts on it"


def test_seeds_are_31_bits_and_differ():
    seeds = {requests.request_seed(run, step, slot, index, number) for run in (0, 1) for step in (0, 1)
             for slot in range(20) for index in range(16) for number in (0, 1)}  # fmt: skip
    assert len(seeds) == 2 * 2 * 20 * 16 * 2 and all(0 <= seed < 2**31 for seed in seeds)
    assert requests.request_seed(1, 2, 3, 4) == 1435759579, "rollouts of runs without rounds would change"
