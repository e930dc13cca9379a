"""The rollout simulation against a loop over single tokens, and the directions that its policies must have."""

from __future__ import annotations

import dataclasses
import json
from collections import deque

import numpy as np
import pytest

from oreal_megatron import settings
from oreal_megatron.config import Config, ConfigError, RolloutConfig
from oreal_megatron.models import architecture
from oreal_megatron.plan import gpus, published
from oreal_megatron.plan.decode_replica import DecodeCost, Replica, SimulatedPrompt, SimulatedRollout
from oreal_megatron.plan.response_lengths import LogNormalLengths, RunLengths
from oreal_megatron.plan.rollout_simulation import PROMPTS, ROLLOUTS, RolloutPolicy, compare, policy_of, simulate
from oreal_megatron.plan.scenario import Scenario
from oreal_megatron.plan.simulated_rounds import run_round

PROMPT = 50
QUEUE = RolloutPolicy("queue")


def seconds_by_token(cost: DecodeCost, lengths: list[int]) -> float:
    """Decode rollouts in order, one token a step; as many at once as there are slots. None needs a prefill."""
    waiting, active, seconds = list(lengths), [], 0.0
    while waiting or active:
        while waiting and len(active) < cost.slots:
            active.append([0, waiting.pop(0)])
        cached = sum(PROMPT + done for done, _ in active)
        seconds += cost.step_s(len(active), cached)
        active = [[done + 1, length] for done, length in active if done + 1 < length]
    return seconds


@pytest.mark.parametrize("row_s", [0.0, 5e-3], ids=["bound by memory", "bound by products"])
def test_a_replica_takes_as_long_as_a_loop_over_tokens(row_s):
    lengths = np.random.default_rng(0).integers(1, 400, 40).tolist()
    cost = DecodeCost(1e-2, 1e-6, row_s, 1e-3, prefill_token_s=0.0, slots=6, cache_tokens=1e9)
    replica, prompt = Replica(cost, PROMPT), SimulatedPrompt([], 0, 40)
    waiting = [SimulatedRollout(prompt, length, 0, 1.0) for length in reversed(lengths)]

    def take(replica):
        return waiting.pop() if waiting and replica.fits(waiting[-1]) else None

    replica.start_all(take)
    while replica.active:
        replica.finish_next()
        replica.start_all(take)
    assert replica.now == pytest.approx(seconds_by_token(cost, lengths), rel=2e-3)
    assert replica.cached == replica.reserved == 0


def test_a_stopped_replica_gives_up_as_many_tokens_as_it_decoded():
    cost = DecodeCost(1e-2, 0.0, 0.0, 0.0, 0.0, slots=9, cache_tokens=1e9)
    rollouts = [SimulatedRollout(SimulatedPrompt([], 0, 1), length, 0, 1.0) for length in (100, 300)]
    replica, waiting = Replica(cost, PROMPT), list(rollouts)
    replica.start_all(lambda _: waiting.pop() if waiting else None)
    replica.finish_next()
    replica.stop(replica.now + 0.5)
    assert [rollout.decoded for rollout in rollouts] == [100, pytest.approx(150)]


@pytest.mark.parametrize(("round_tokens", "starts"), [(100, 3), (50, 5), (30, 7)])
def test_every_round_starts_its_rollouts(round_tokens, starts):
    """Lengths of 10, 60 and 100 tokens."""
    ends = []
    for start_s in (0.0, 0.5):
        prompt = SimulatedPrompt([], 0, 3)
        rollouts = [SimulatedRollout(prompt, length, 0, 1.0) for length in (10, 60, 100)]
        replica = Replica(DecodeCost(0.0, 0.0, 0.0, 1e-2, 0.0, slots=9, cache_tokens=1e9, start_s=start_s), PROMPT)
        while prompt.unfinished:
            growing = deque(rollout for rollout in rollouts if not rollout.finished)
            run_round([replica], [growing], round_tokens, False, replica.now)
        ends.append(replica.now)
    assert ends == pytest.approx([1.0, 1.0 + 0.5 * starts]), "100 steps of a hundredth of a second, and the starts"


@pytest.mark.parametrize(("mean", "sigma"), [(5000, 0.6), (12000, 0.3), (30, 1.5)])
def test_lengths_have_the_mean_that_is_asked_for(mean, sigma):
    lengths = LogNormalLengths.with_mean(mean, sigma, 0.5, 14000)
    drawn = lengths.draw(np.random.default_rng(1), 4000, 16)
    assert drawn.mean() == pytest.approx(mean, rel=0.05) and drawn.max() <= 14000 and drawn.min() >= 1
    within = np.log(drawn[:, :1] + 0.5).ravel(), np.log(drawn[:, 1:2] + 0.5).ravel()
    assert np.corrcoef(*within)[0, 1] == pytest.approx(0.5, abs=0.12), "rollouts of a prompt resemble each other"
    with pytest.raises(ConfigError, match="impossible"):
        LogNormalLengths.with_mean(14000, 0.6, 0.5, 14000)


def test_lengths_of_a_run_are_its_rollouts(tmp_path):
    (tmp_path / "rollouts").mkdir()
    rows = [{"slot": slot, "tokens": 10 * slot + k} for slot in (1, 2) for k in (3, 4)]
    (tmp_path / "rollouts/step_000000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = RunLengths.of_run(tmp_path).draw(np.random.default_rng(0), 50, 60)
    assert {tuple(sorted(set(row.tolist()))) for row in drawn} == {(13, 14), (23, 24)}
    with pytest.raises(ConfigError, match="holds no rollouts"):
        RunLengths.of_run(tmp_path / "rollouts")


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    config: Config = settings.load(
        "examples/recipes/oreal.py:oreal_7b", ["data.prompts_per_step=32", "engine.tensor=1", "engine.max_num_seqs=32"]
    )
    arch = architecture.read(published.read_config(config.model.path)[0])
    return Scenario(config, arch, gpus.find_gpu("h100-80g"), 8)


@pytest.fixture(scope="module")
def tail() -> LogNormalLengths:
    return LogNormalLengths.with_mean(1000, 1.0, 0.3, 14000)


def test_equal_lengths_leave_nothing_to_win(scenario):
    constant = LogNormalLengths(500, 1e-9, 0.5, 14000)
    dealt, queued = (simulate(scenario, 10.0, policy, constant, 0) for policy in (PROMPTS, QUEUE))
    assert dealt.generation_s == pytest.approx(queued.generation_s, rel=1e-3)
    assert dealt.idle_share == pytest.approx(0, abs=1e-3) and dealt.length_ratio == pytest.approx(1, abs=1e-3)


def test_replicas_are_less_idle_the_finer_the_work_is_dealt(scenario, tail):
    prompts, rollouts, queue = (simulate(scenario, 10.0, policy, tail, 0) for policy in (PROMPTS, ROLLOUTS, QUEUE))
    assert queue.idle_share < rollouts.idle_share < prompts.idle_share
    assert queue.generation_s < rollouts.generation_s < prompts.generation_s
    assert prompts.staleness == queue.staleness == prompts.aborted_share == 0


def test_aborting_shortens_what_is_trained_and_carrying_does_not(scenario, tail):
    aborted = simulate(scenario, 10.0, RolloutPolicy("abort", pool=2.0), tail, 0)
    carried = simulate(scenario, 10.0, RolloutPolicy("carry", pool=2.0, carry=True), tail, 0)
    assert aborted.length_ratio < 0.9 and aborted.aborted_share > 0.2
    assert carried.length_ratio == pytest.approx(1, abs=0.08) and carried.aborted_share == 0
    assert carried.tokens_per_gpu_second > aborted.tokens_per_gpu_second
    assert carried.staleness == pytest.approx(1, abs=0.2), "a pool of two steps' prompts waits one step"


def test_no_prompt_waits_longer_than_the_bound(scenario, tail):
    policy = RolloutPolicy("carry", pool=2.0, carry=True, staleness=1)
    bounded = simulate(scenario, 10.0, policy, tail, 0)
    free = simulate(scenario, 10.0, dataclasses.replace(policy, staleness=99), tail, 0)
    assert bounded.oldest == 1 < free.oldest
    assert bounded.generation_s > free.generation_s, "waiting costs time"
    with pytest.raises(ValueError, match="cannot be trained within 1 steps"):
        dataclasses.replace(policy, pool=2.5)


def test_rounds_cost_little_and_the_more_the_longer_they_are(scenario, tail):
    engine = dataclasses.replace(scenario.config.engine, max_num_seqs=64)  # of a replica: all that are in flight
    scenario = dataclasses.replace(scenario, config=dataclasses.replace(scenario.config, engine=engine))
    dealt = simulate(scenario, 10.0, ROLLOUTS, tail, 0)
    at_once = simulate(scenario, 10.0, dataclasses.replace(ROLLOUTS, carry=True, round_tokens=14000), tail, 0)
    assert at_once.generation_s == pytest.approx(dealt.generation_s, rel=1e-3) and at_once.staleness == 0
    carry = dataclasses.replace(ROLLOUTS, pool=2.0, carry=True, staleness=1)
    free, short, long = (
        simulate(scenario, 10.0, dataclasses.replace(carry, round_tokens=tokens), tail, 0) for tokens in (0, 32, 1024)
    )
    assert free.generation_s == pytest.approx(short.generation_s, rel=0.05) and short.generation_s < long.generation_s
    assert long.generation_s < dealt.generation_s and long.oldest == 1
    assert long.length_ratio == pytest.approx(1, abs=0.08) and long.aborted_share == 0


def test_a_recipe_with_a_pool_is_simulated_too(scenario, tail):
    assert policy_of(scenario.config.rollout) is None
    rollout = RolloutConfig(256, 1.5, staleness=1)
    config = dataclasses.replace(scenario.config, rollout=rollout)
    own = policy_of(rollout)
    assert own == RolloutPolicy("the recipe's", "rollouts", 1.5, True, 0.0, 1, 256)
    names = [result.policy.name for result in compare(dataclasses.replace(scenario, config=config), 10.0, tail)]
    assert "the recipe's" in names


def test_one_step_ahead_takes_the_longer_of_both(scenario, tail):
    ahead = dataclasses.replace(QUEUE, separate=0.5)
    fast, slow = (simulate(scenario, other, ahead, tail, 0) for other in (0.0, 1e4))
    assert fast.step_s == fast.generation_s and slow.step_s == pytest.approx(2e4) and fast.staleness == 1


def test_measured_costs_replace_those_of_the_plan_and_time_is_proportional_to_them(scenario, tail):
    scenario = dataclasses.replace(scenario, assumed=dataclasses.replace(scenario.assumed, prompt_tokens=0))
    cost = DecodeCost(0.0, 0.0, 1e-3, 4e-3, 1e-3, 32, 1e12)
    slower = dataclasses.replace(cost, row_s=3e-3, overhead_s=12e-3, prefill_token_s=3e-3)
    for policy in (ROLLOUTS, RolloutPolicy("pool", "rollouts", 2.0, True, 0.0, 2, 512)):
        once, thrice = (simulate(scenario, 0.0, policy, tail, 0, measured).generation_s for measured in (cost, slower))
        assert thrice == pytest.approx(3 * once) and once != simulate(scenario, 0.0, policy, tail, 0).generation_s
