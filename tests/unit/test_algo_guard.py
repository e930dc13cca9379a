"""Skipped steps, the end of a run that skips too many; dumps on disk and their comparison."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from fake_pieces import FakeHooks

from oreal_megatron import config as c
from oreal_megatron.algo import guard, loss, packing
from oreal_megatron.observe import dumps
from oreal_megatron.observe.metric_comparison import compare_metrics
from oreal_megatron.observe.recorder import Recorder
from oreal_megatron.records import PackingSpec, TokenWeights
from oreal_megatron.runtime import checkpoint_folders
from oreal_megatron.training import supervised

FINITE = {"loss/total": 1.0, "gradient_norm": 2.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FINITE)
def test_a_step_that_is_not_finite_is_skipped(name, value):
    assert not guard.decide(guard.GuardState(), FINITE, c.GuardConfig()).skip
    assert guard.decide(guard.GuardState(), FINITE | {name: value}, c.GuardConfig()).skip


def test_a_spike_is_measured_by_the_median_of_the_steps_that_were_taken():
    config = c.GuardConfig(spike_factor=3.0, spike_window=3)
    state = guard.GuardState()
    for norm in (1.0, 100.0):
        state = guard.decide(state, {"gradient_norm": norm}, config).state
        assert guard.norm_limit(state, config) == math.inf, "before the window is full there is no median"
    state = guard.decide(state, {"gradient_norm": 2.0}, config).state
    assert guard.norm_limit(state, config) == 6.0
    assert guard.norm_limit(state.after_skip(), config) == 6.0
    later = state.after_step(3.0, 3).after_step(4.0, 3)
    assert guard.norm_limit(later, config) == 9.0, "the oldest have left the window"
    assert guard.norm_limit(state, c.GuardConfig()) == math.inf
    spike, largest = (guard.decide(state, FINITE | {"gradient_norm": norm}, config) for norm in (6.1, 6.0))
    assert (spike.skip, spike.state, spike.norm_limit) == (True, state.after_skip(), 6.0)
    assert (largest.skip, largest.state, largest.norm_limit) == (False, state.after_step(6.0, 3), 6.0)


def test_skipped_steps_are_counted_over_the_run_and_in_a_row():
    state = guard.GuardState().after_skip().after_skip().after_step(1.0, 5).after_skip()
    assert state.metrics() == {"skipped": 3, "consecutive_skips": 1}


def test_the_history_survives_a_checkpoint_and_those_of_0_1_0_are_read():
    state = guard.GuardState(3, 1, (1.0, 2.0))
    stored = json.loads(json.dumps(state.to_checkpoint()))
    assert stored == {"skipped": 3, "in_a_row": 1, "norms": [1.0, 2.0]}, "the keys of version 0.1.0"
    assert guard.GuardState.from_checkpoint(stored) == state


def row(model: str, **values: float) -> dict[str, float]:
    return {f"{model}/{name}": value for name, value in values.items()}


def test_too_many_in_a_row_stop_the_run_with_the_reason():
    config = c.GuardConfig(max_consecutive_skips=2)
    guard.check(row("policy", gradient_norm=math.nan, skipped=7, consecutive_skips=1), config, 4)
    with pytest.raises(c.RunStopped, match="step 5: the policy has skipped 2 steps in a row.*gradient_norm is nan"):
        guard.check(row("policy", gradient_norm=math.nan, skipped=8, consecutive_skips=2), config, 5)
    spike = row("reward_model", gradient_norm=5.0, gradient_norm_limit=4.0, skipped=2, consecutive_skips=2)
    with pytest.raises(c.RunStopped, match="the reward model has skipped .* is 5, above its limit of 4"):
        guard.check(spike, config, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reward", [1.0, -1.0])
def test_one_bad_score_is_seen(bad, reward, make_samples):
    batch = packing.batch(make_samples(1), PackingSpec(100))
    (micro_batch,) = batch.micro_batches
    score = torch.zeros(len(micro_batch.labels))
    score[micro_batch.action_offsets[micro_batch.reward.tolist().index(reward)]] = bad
    _, metrics = loss.reward_model(score, micro_batch, batch.counts, c.Config())
    assert not metrics["reward_model/score_mean"].isfinite()


def test_supervised_steps_that_are_skipped_stop_it_too(make_samples, tmp_path):
    class Policy:
        def imitate(self, batch) -> tuple[list, dict[str, float]]:
            return [], {"loss/total": math.nan} | row("policy", skipped=1, consecutive_skips=1)

    class Demonstrations:
        def take(self, step: int) -> list:
            return make_samples(1)

    config = c.Config(run=str(tmp_path / "run"), guard=c.GuardConfig(max_consecutive_skips=1))
    with pytest.raises(c.RunStopped, match="step 0: the policy has skipped 1 steps in a row.*loss/total is nan"):
        supervised.imitate(config, Demonstrations(), Policy(), Recorder(config), FakeHooks([]), PackingSpec(1000))


def test_broken_weights_stop_the_run_at_once():
    guard.check(row("policy", largest_weight=1e30), c.GuardConfig(), 0)
    with pytest.raises(c.RunStopped, match="step 0: the policy has weights that are not finite"):
        guard.check(row("policy", largest_weight=math.inf), c.GuardConfig(), 0)


@pytest.fixture
def dumped(tmp_path, make_samples):
    """A step of two data-parallel ranks, as written and as they had it."""
    config = c.Config(run=str(tmp_path / "run"))
    path, samples, shares = tmp_path / "run/dumps" / checkpoint_folders.name(3), make_samples(3), []
    for rank in range(2):
        batch = packing.batch(samples, PackingSpec(30, rank, 2))
        values = [torch.rand(len(part.labels)) for part in batch.micro_batches]
        dumps.write_dump(path, 3, (rank, 2), batch, values, TokenWeights(values), {"loss/total": math.nan}, config)
        shares.append((batch, values))
    return path, config, shares


def equal(one, other) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one)]
    return all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) if isinstance(a, torch.Tensor) else a == b for a, b in pairs
    )


def test_a_dump_gives_back_what_was_written(dumped):
    path, config, shares = dumped
    dump = dumps.read_dump(path)
    assert (dump.step, dump.shares, dump.config) == (3, 2, config) and math.isnan(dump.metrics["loss/total"])
    for rank, (batch, values) in enumerate(shares):
        share = dump.share(rank, 2)
        assert share.batch.counts == batch.counts
        assert all(map(equal, share.batch.micro_batches, batch.micro_batches))
        assert all(map(torch.equal, share.token_weights.values, values)) and all(
            map(torch.equal, share.reference_logp, values)
        )
    alone = dump.share(0, 1).batch.micro_batches
    assert len(alone) == sum(len(batch.micro_batches) for batch, _ in shares)


def test_a_dump_keeps_mini_batches_also_on_fewer_ranks(tmp_path, make_samples):
    path, samples = tmp_path / checkpoint_folders.name(0), make_samples(5)
    written = [packing.batch(samples, PackingSpec(30, rank, 2), 2) for rank in range(2)]
    for rank, batch in enumerate(written):
        values = [part.labels.float() for part in batch.micro_batches]
        dumps.write_dump(path, 0, (rank, 2), batch, values, TokenWeights(values), {}, c.Config())
    dump = dumps.read_dump(path)
    for rank, batch in enumerate(written):
        assert dump.share(rank, 2).batch.mini_batches == batch.mini_batches and len(batch.mini_batches) == 2
    share = dump.share(0, 1)
    for number, (own, part) in enumerate(share.batch.split()):
        rows = [written[rank].split()[number][1] for rank in range(2)]
        assert part.counts == rows[0].counts
        expected = [micro_batch for row in rows for micro_batch in row.micro_batches]
        assert len(part.micro_batches) == len(expected) and all(map(equal, part.micro_batches, expected))
        for micro_batch, weight_T in zip(part.micro_batches, share.token_weights.values[own], strict=True):
            assert torch.equal(weight_T, micro_batch.labels.float())
    header = json.loads((path / "step.json").read_text())
    del header["mini_batches"]  # as dumps before them
    (path / "step.json").write_text(json.dumps(header))
    assert [part.counts for _, part in dumps.read_dump(path).share(0, 2).batch.split()] == [dump.counts]


def test_what_the_policy_was_not_given_is_not_there(tmp_path, make_samples):
    batch = packing.batch(make_samples(1), PackingSpec(30))
    dumps.write_dump(tmp_path / "step_000000", 0, (0, 1), batch, None, TokenWeights([], valid=False), {}, c.Config())
    share = dumps.read_dump(tmp_path / "step_000000").share(0, 1)
    assert share.reference_logp is None and not share.token_weights.valid


def test_a_damaged_dump_is_refused_with_a_sentence(dumped):
    path, _, _ = dumped
    with pytest.raises(c.ConfigError, match="which 3 cannot share evenly"):
        dumps.read_dump(path).share(0, 3)
    (path / "share_001.safetensors").write_bytes(b"12345678")
    with pytest.raises(c.ConfigError, match="share_001.safetensors is missing, damaged"):
        dumps.read_dump(path).share(1, 2)
    for folder in (path.parent.parent, path.parent, path.parent / "step_000099"):
        with pytest.raises(
            c.ConfigError, match=f"is not the dump of a step; name one of .* {path.parent}: {path.name}$"
        ):
            dumps.read_dump(folder)
    with pytest.raises(c.ConfigError, match="none is near it; a run has dumps with record.dumps above 0"):
        dumps.read_dump(path.parent / "elsewhere/run")
    (path / "step.json").write_text("{}")
    with pytest.raises(c.ConfigError, match="is not the dump of a step"):
        dumps.read_dump(path)


def test_dumps_go_with_the_checkpoint_before_them_but_skipped_steps_stay(tmp_path, make_samples):
    batch, skipped = packing.batch(make_samples(1), PackingSpec(30)), {"policy/consecutive_skips": 1}
    token_weights = TokenWeights([], valid=False)
    for step in range(4):
        path = tmp_path / "dumps" / checkpoint_folders.name(step)
        dumps.write_dump(path, step, (0, 1), batch, None, token_weights, skipped if step == 1 else {}, c.Config())
    (tmp_path / "dumps" / checkpoint_folders.name(0) / "step.json").write_text("cut of")
    dumps.delete_dumps(tmp_path, lambda name: name < "step_000003")
    assert sorted(path.name for path in (tmp_path / "dumps").iterdir()) == ["step_000001", "step_000003"]


def test_a_replay_compares_numbers_and_what_is_none():
    before = {"loss": 1.0, "norm": math.nan, "clip": math.inf, "gone": 2.0}
    same = {"loss": 1.0 + 1e-7, "norm": math.nan, "clip": math.inf, "given/token_weights": 0.0}
    assert all(row.same for row in compare_metrics(before, same, 1e-5))
    assert not compare_metrics(before, same, 0.0)[0].same
    for name, value in {"loss": 1.1, "norm": 1.0, "clip": 3.0, "new": 1.0, "given/token_weights": 0.1}.items():
        changed = {row.name: row.same for row in compare_metrics(before, same | {name: value}, 1e-5)}
        assert not changed[name], name
