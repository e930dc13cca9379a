"""The pool of prompts in flight: properties of its schedule over random lengths, and what the loop is given."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_engine import ScriptedDataset, ScriptedEngine, ScriptedVerifier

from oreal_megatron import config as c
from oreal_megatron.algo import logprob_parity, selection
from oreal_megatron.config import ConfigError
from oreal_megatron.records import Outcome
from oreal_megatron.rollout import pool_file, pool_metrics
from oreal_megatron.rollout.pool_schedule import PromptPool, StepEnd
from oreal_megatron.rollout.rollout_pool import RolloutPool

K, LIMIT = 3, 20


def configuration(prompts: int = 3, **rollout) -> c.Config:
    config = c.Config(
        rollout=c.RolloutConfig(**{"round_tokens": 4, "pool": 2.0} | rollout),
        loss=c.LossConfig(ratio_cap=2.0, ratio_tokens="carried"),
        data=c.DataConfig(prompts_per_step=prompts),
        sampling=c.SamplingConfig(rollouts_per_prompt=K, max_new_tokens=LIMIT),
    )
    c.validate(config)
    return config


def long_tail(seed: int):
    """Return lengths of a few tokens, of which one in ten reaches the limit."""
    return lambda position, index: random.Random(f"{seed} {position} {index}").choice((1, 2, 3, 3, 4, 5, 7, 9, 12, 30))


def build(config: c.Config, length, replicas: int = 1, correct=lambda rollout: rollout.tokens[0] % 2 == 0):
    engine = ScriptedEngine(length, LIMIT, replicas)
    return RolloutPool(config, ScriptedDataset(config.data.prompts_per_step), engine, ScriptedVerifier(correct))


def run_step(pool: RolloutPool, step: int):
    """Run what the loop does of one step; every step is an update of the policy."""
    pool.engine.version = step
    rows = pool.generate(pool.take(step), pool.config.sampling, (0, step), pool.submit)
    return rows, pool.verdicts(rows)


SCHEDULES = st.builds(
    lambda prompts, pool, staleness, enough, carry, tokens: configuration(
        prompts, pool=min(pool, staleness + 1.0), staleness=staleness, enough=enough, carry=carry, round_tokens=tokens
    ),
    st.integers(1, 4), st.sampled_from([1.0, 1.5, 2.0, 3.0]), st.integers(0, 3), st.sampled_from(["complete", "mixed"]),
    st.booleans(), st.sampled_from([1, 4, 7, 50]),
)  # fmt: skip


@settings(max_examples=60)
@given(SCHEDULES, st.integers(0, 10**6), st.sampled_from([1, 2]))
def test_every_schedule_trains_whole_prompts_once_and_none_that_is_too_old(config, seed, replicas):
    length = long_tail(seed)
    pool, trained, limit = build(config, length, replicas), [], config.rollout.version_limit
    for step in range(6):
        first_of = {prompt.slot: prompt.first_step for prompt in pool.pool.prompts}
        rows, verdicts = run_step(pool, step)
        metrics = pool.metrics()
        assert rows and len(rows) <= round(config.data.prompts_per_step * config.rollout.pool)
        if config.rollout.enough == "complete":
            assert len(rows) >= config.data.prompts_per_step
        logprob_parity.check_versions(rows, step, step, step, limit)  # the loop's own check
        for row, judged in zip(rows, verdicts, strict=True):
            position = int(row[0].prompt.question)
            trained.append(position)
            assert [len(rollout.tokens) for rollout in row] == [min(length(position, k), LIMIT) for k in range(K)]
            assert [rollout.finished for rollout in row] == [length(position, k) <= LIMIT for k in range(K)]
            assert [(v.outcome is Outcome.CORRECT) for v in judged] == [r.tokens[0] % 2 == 0 for r in row]
            assert step - first_of.get(row[0].slot, step) <= limit
            for rollout in row:
                assert len(rollout.logprobs) == len(rollout.tokens)
                if rollout.versions:
                    versions, counts = zip(*rollout.versions, strict=True)
                    assert list(versions) == sorted(set(versions)) and sum(counts) == len(rollout.tokens)
                    assert rollout.carried == sum(n for v, n in rollout.versions if v < step)
                else:
                    assert rollout.carried == (len(rollout.tokens) if rollout.version < step else 0)
        keys = [rollout.key for row in rows for rollout in row]
        assert len(set(keys)) == len(keys), "the verifier and the dumps go by them"
        assert metrics["rollout/dropped_prompts"] == 0
        assert bool(pool.pool.prompts) <= config.rollout.carry
    assert len(set(trained)) == len(trained), "no prompt is trained twice"
    if config.rollout.carry:
        in_flight = [prompt.position for prompt in pool.pool.prompts]
        assert sorted(trained + in_flight) == list(range(pool.pool.next_position)), "none is lost"


def test_carrying_keeps_the_lengths_and_discarding_trains_shorter_responses():
    """Over 5 seeds of 20 steps: 2400 responses of 6.6 tokens on average, of which discarding loses the longest."""
    lengths, ratios = {True: [], False: []}, {True: [], False: []}
    for carry in (True, False):
        for seed in range(5):
            pool = build(configuration(8, carry=carry), long_tail(seed))
            for step in range(20):
                rows, _ = run_step(pool, step)
                lengths[carry] += [len(rollout.tokens) for row in rows for rollout in row]
                ratios[carry].append(pool.metrics()["rollout/length_ratio"])
                assert bool(pool.metrics()["rollout/discarded_token_share"]) is not carry
    carried, discarding = (sum(values) / len(values) for values in (lengths[True], lengths[False]))
    assert carried == pytest.approx(6.6, rel=0.06) and discarding < 0.9 * carried
    assert set(ratios[True]) == {1.0} and sum(ratios[False]) / len(ratios[False]) < 0.95, "the metric shows the bias"


def test_shares_of_nothing_are_absent():
    pool = PromptPool()
    metrics = pool_metrics.of_step(pool, StepEnd((), pool, ()), (), 0, configuration())
    assert metrics == {f"rollout/{name}": 0 for name in ("pool_prompts", "carried_rollouts", "carried_tokens",
                                                       "generated_tokens", "aborted", "dropped_prompts")}  # fmt: skip


def test_a_pool_that_always_completes_gives_what_the_plain_engine_gives():
    config = configuration(pool=1.0, round_tokens=LIMIT)
    pool = build(config, long_tail(3))
    plain, dataset = ScriptedEngine(long_tail(3), LIMIT), ScriptedDataset(3)
    for step in range(3):
        rows, _ = run_step(pool, step)
        plain.version = step
        assert rows == plain.generate(dataset.take(step), config.sampling, (0, step))


def test_the_long_tail_costs_fewer_rounds_than_waiting_for_it():
    def length(position: int, index: int) -> int:
        return 20 if position % 4 == 0 and index == 0 else 3

    steps = 8
    rounds = {}
    for pool_size in (1.0, 2.0):
        pool = build(configuration(4, pool=pool_size), length)
        for step in range(steps):
            run_step(pool, step)
        rounds[pool_size] = len(pool.engine.calls)
    assert rounds[1.0] == steps * 5 and rounds[2.0] < 0.7 * rounds[1.0]


def test_generation_that_is_interrupted_changes_nothing():
    pool = build(configuration(), long_tail(1))
    run_step(pool, 0)
    before, extend = pool.pool, pool.engine.extend

    def interrupted(*arguments):
        if len(pool.engine.calls) == 2:
            raise c.Preempted("a stop was requested during generation")
        return extend(*arguments)

    pool.engine.extend, pool.engine.calls = interrupted, []
    pool.engine.length = lambda position, index: 20
    with pytest.raises(c.Preempted):
        run_step(pool, 1)
    assert pool.pool == before and len(pool.engine.calls) == 2


def test_prompts_beyond_a_bound_that_a_resumed_run_lowers_are_dropped_and_counted():
    pool = build(configuration(staleness=3), lambda position, index: 20 if position < 3 else 1)
    for step in range(3):
        run_step(pool, step)
    old = [prompt for prompt in pool.pool.prompts if prompt.first_step < 2]
    assert old
    pool.config = configuration(staleness=1)
    rows, _ = run_step(pool, 3)
    assert pool.metrics()["rollout/dropped_prompts"] == len(old)
    positions = {prompt.position for prompt in old}
    assert not positions & {int(row[0].prompt.question) for row in rows}
    assert not positions & {prompt.position for prompt in pool.pool.prompts}


@pytest.mark.parametrize("version", [1, 6])
def test_a_rollout_outside_the_bound_stops_the_run_before_it_is_trained(version):
    pool = build(configuration(), long_tail(2))
    rows, _ = run_step(pool, 5)
    rows[1][2] = dataclasses.replace(rows[1][2], version=version)
    with pytest.raises(logprob_parity.LogprobMismatch, match=rf"1 rollouts were not .* versions 4 to 5, .* {version};"):
        logprob_parity.check_versions(rows, 5, 5, 5, pool.config.rollout.version_limit)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_replica_grows_its_oldest_rollouts_as_many_as_it_runs_at_once(replicas):
    config = dataclasses.replace(configuration(6), engine=c.EngineConfig(max_num_seqs=4))
    pool = build(config, lambda position, index: 30, replicas)
    run_step(pool, 0)
    for growing in pool.engine.calls:
        by_replica = [[r for r in growing if (r.slot + r.index) % replicas == replica] for replica in range(replicas)]
        assert all(len(own) <= 4 for own in by_replica)
        positions = [int(rollout.prompt.question) for rollout in growing]
        assert positions == sorted(positions)


def test_the_pool_survives_its_file(tmp_path):
    pool = build(configuration(pool=3.0, staleness=2), long_tail(7))
    for step in range(3):
        run_step(pool, step)
    assert any(prompt.verdicts.count(None) < K for prompt in pool.pool.prompts), "some are graded"
    assert any(rollout.versions for rollout in pool.pool.rollouts())
    (tmp_path / pool_file.NAME).write_bytes(pool.attachments()[pool_file.NAME])
    assert pool_file.read(tmp_path, pool.problem) == pool.pool
    again = build(pool.config, long_tail(7))
    again.restore(tmp_path, 3)
    assert run_step(again, 3) == run_step(pool, 3)
    (tmp_path / pool_file.NAME).write_bytes(pool.attachments()[pool_file.NAME][:-9])
    with pytest.raises(ConfigError, match="is not a pool of rollouts that this version can read"):
        pool_file.read(tmp_path, pool.problem)


def test_a_run_that_had_no_pool_goes_on_behind_the_problems_it_has_seen(tmp_path, caplog):
    pool = build(configuration(), long_tail(7))
    pool.restore(tmp_path, 4)
    assert [int(prompt.question) for prompt in pool.take(4)] == list(range(12, 18)) and "in flight" in caplog.text


def test_parity_compares_tokens_of_the_present_version_behind_those_of_earlier_ones():
    config = dataclasses.replace(configuration(), engine=c.EngineConfig(parity_tokens=3, parity_rollouts=2))
    pool = build(config, long_tail(11), replicas=2)
    for step in range(4):
        rows, verdicts = run_step(pool, step)
    chosen = logprob_parity.samples(rows, config.engine, replicas=2)
    sources = {rollout.logprobs[rollout.carried :][:3]: rollout for row in rows for rollout in row}
    assert 0 < len(chosen) <= 4 and any(sources[sample.engine_logprobs].carried for sample in chosen)
    for sample in chosen:
        rollout = sources[sample.engine_logprobs]
        assert sample.prompt_tokens == rollout.prompt.tokens + rollout.tokens[: rollout.carried]
        assert sample.response_tokens == rollout.tokens[rollout.carried :][:3]
    samples = selection.samples(rows, verdicts, c.SelectionConfig(keep="mixed"), (0, 3))
    assert {sample.carried for sample in samples} == {
        rollout.carried for row in rows for rollout in row if (rollout.key) in {sample.rollout for sample in samples}
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(rollout=c.RolloutConfig(pool=2.0)), "rollout.pool is 2, which needs rounds; set rollout.round_tokens"),
        (dict(rollout=c.RolloutConfig(enough="mixed")), "rollout.enough is mixed, which needs rounds"),
        (dict(rollout=c.RolloutConfig(round_tokens=8, pool=2.5)), "set rollout.staleness to at least 2, or"),
        (dict(rollout=c.RolloutConfig(round_tokens=8)), "incorrect samples need their importance ratio"),
        (dict(loss=c.LossConfig(ratio_cap=2.0)), "loss.ratio_tokens=carried, which compares two versions"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, says):
    with pytest.raises(ConfigError, match=says):
        c.validate(c.Config(**changes))


def test_a_stale_pool_is_waited_for_and_not_shortened():
    """A response of five rounds in a pool whose others take one is trained in the last step that the bound allows."""

    def length(position: int, index: int) -> int:
        return 20 if (position, index) == (0, 0) else 2

    pool = build(configuration(2, staleness=2), length)
    steps = [[int(row[0].prompt.question) for row in run_step(pool, step)[0]] for step in range(4)]
    assert 0 in steps[2] and len(pool.engine.calls) == 1 + 1 + 3 + 1
