"""The loop with hand-written fakes: order of events, what is trained on, what stops the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from fake_pieces import (
    FakeEngine,
    FakeHooks,
    FakeModel,
    FakePolicy,
    FakePrompts,
    FakeRewardModel,
    FakeVerifier,
    FakeWeightSync,
)

from oreal_megatron import config as c
from oreal_megatron import loop
from oreal_megatron.algo.logprob_parity import LogprobMismatch, NonFiniteLogprobs
from oreal_megatron.observe.dumps import StepDumps
from oreal_megatron.observe.idle_steps import IdleSteps
from oreal_megatron.observe.idle_steps import cause_of_idleness as steps_cause
from oreal_megatron.observe.recorder import Recorder
from oreal_megatron.observe.run_folder import refuse_existing
from oreal_megatron.records import Outcome, PackingSpec, ScoredRollout, TokenWeights, Verdict

SPEC = PackingSpec(1000)


def run_loop(tmp_path: Path, config: c.Config, events: list, engine=None, first: int = 0):
    policy, engine = FakePolicy("policy", events), engine or FakeEngine(events)

    loop.train(
        config,
        FakePrompts(),
        engine,
        FakeVerifier(),
        policy,
        FakeModel("reference", events),
        FakeRewardModel("reward model", events),
        FakeWeightSync(engine, events),
        Recorder(config, first),
        FakeHooks(events),
        SPEC,
    )


def configuration(tmp_path: Path, **changes) -> c.Config:
    return c.Config(run=str(tmp_path / "run"), steps=2, policy_freeze_steps=1, **changes)


def test_order_of_a_step_and_the_frozen_steps(tmp_path):
    events: list[str] = []
    run_loop(tmp_path, configuration(tmp_path), events)
    assert events == [
        "generate (0, 0)",
        "reward model",
        "after 1",
        "generate (0, 1)",
        "reward model",
        "policy 4 4",  # one right and one wrong answer of two prompts, two tokens each
        "weight sync",
        "after 2",
    ]


def test_run_folder_holds_what_happened(tmp_path):
    config = configuration(tmp_path)
    run_loop(tmp_path, config, [])
    folder = tmp_path / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[1]["reward/pass_rate"] == pytest.approx(3 / 12) and rows[1]["batch/mixed_prompts"] == 2
    assert {"seconds/generate", "seconds/policy", "loss/total"} <= rows[1].keys()
    rollouts = [json.loads(line) for line in (folder / "rollouts/step_000001.jsonl").read_text().splitlines()]
    assert len(rollouts) == 12 and [r["verdict"] for r in rollouts].count("correct") == 3
    assert json.loads((folder / "config.json").read_text())["policy_freeze_steps"] == 1
    assert "git_commit" in json.loads((folder / "environment.json").read_text())
    assert list((folder / "tensorboard").iterdir())
    with pytest.raises(c.ConfigError, match="holds config.json, .* already"):
        refuse_existing(config)


def test_a_resumed_run_writes_its_steps_once(tmp_path):
    config = configuration(tmp_path)
    run_loop(tmp_path, config, [])
    events: list[str] = []
    run_loop(tmp_path, config, events, first=1)
    assert events[0] == "generate (0, 1)"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]


def test_a_resumed_run_records_what_it_was_resumed_with(tmp_path):
    config = configuration(tmp_path)
    run_loop(tmp_path, config, [])
    run_loop(tmp_path, dataclasses.replace(config, steps=3), [], first=1)
    folder = tmp_path / "run"
    assert json.loads((folder / "config.json").read_text())["steps"] == 3
    assert json.loads((folder / "config_before_step_1.json").read_text())["steps"] == 2


def test_a_line_cut_off_by_a_crash_does_not_stop_the_resume(tmp_path):
    config = configuration(tmp_path)
    run_loop(tmp_path, config, [])
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 2, "reward/me')
    run_loop(tmp_path, config, [], first=1)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]


def test_without_a_reward_model_nothing_is_frozen(tmp_path):
    events: list[str] = []
    run_loop(tmp_path, configuration(tmp_path, reward_model=c.RewardModelConfig(enabled=False)), events)
    assert events.count("weight sync") == 2


def test_an_engine_with_other_weights_stops_the_run_before_anything_is_trained(tmp_path):
    events: list[str] = []
    with pytest.raises(LogprobMismatch, match=r"step 0: .* differ by 0\.5 nats .*4 tokens compared"):
        run_loop(tmp_path, configuration(tmp_path), events, FakeEngine(events, logprob=-1.5))
    assert events == ["generate (0, 0)"]


@pytest.mark.parametrize("logprob", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize(
    ("cause", "says"),
    [("", "the engine's log-probs are not finite, those of the trainer are"), ("x is nan", r"\(rank 0: x is nan\)")],
)
def test_values_that_are_not_finite_are_reported_as_that(tmp_path, monkeypatch, logprob, cause, says):
    monkeypatch.setattr(FakePolicy, "non_finite", cause)
    events: list[str] = []
    with pytest.raises(NonFiniteLogprobs, match=f"step 0: .*{says}") as stop:
        run_loop(tmp_path, configuration(tmp_path), events, FakeEngine(events, logprob=logprob))
    assert "differ by" not in str(stop.value) and events == ["generate (0, 0)"]


def test_one_answer_of_a_bad_replica_does_not_drown_among_good_ones(tmp_path):
    class OneBadReplica(FakeEngine):
        def generate(self, prompts, sampling, seed, finished):
            rows = super().generate(prompts, sampling, seed, finished)
            rows[1][0] = dataclasses.replace(rows[1][0], logprobs=(-1.4, -1.0))
            return rows

    config = configuration(tmp_path, engine=c.EngineConfig(parity_tolerance_nats=0.15))
    with pytest.raises(LogprobMismatch, match=r"differ by 0\.2 nats"):
        run_loop(tmp_path, config, [], OneBadReplica([]))


class Rounded(FakeEngine):
    """Its answers are of twenty tokens; the first so many log-probs of one of them are off by 3 nats."""

    off = 1

    def generate(self, prompts, sampling, seed, finished):
        rows = super().generate(prompts, sampling, seed, finished)
        for row in rows:
            row[:] = [dataclasses.replace(one, tokens=(7,) * 20, logprobs=(-1.0,) * 20) for one in row]
        rows[1][0] = dataclasses.replace(rows[1][0], logprobs=(-4.0,) * self.off + (-1.0,) * (20 - self.off))
        return rows


def test_a_single_token_far_off_as_half_precision_has_them_does_not_stop_the_run(tmp_path):
    config = configuration(tmp_path, engine=c.EngineConfig(parity_tolerance_nats=0.1))
    run_loop(tmp_path, config, [], Rounded([]))
    (row, *_) = (json.loads(line) for line in (Path(config.run) / "metrics.jsonl").open())
    assert row["parity/logprob_gap"] == pytest.approx(0.15) and row["parity/capped_gap"] == pytest.approx(0.02)


def test_several_tokens_off_do(tmp_path):
    class Wrong(Rounded):
        off = 6

    config = configuration(tmp_path, engine=c.EngineConfig(parity_tolerance_nats=0.1))
    with pytest.raises(LogprobMismatch, match=r"differ by 0\.9 nats"):
        run_loop(tmp_path, config, [], Wrong([]))


def test_an_engine_that_was_not_handed_the_newest_weights_stops_the_run(tmp_path):
    class Deaf(FakeEngine):
        version = property(lambda self: 0, lambda self, value: None)

    with pytest.raises(LogprobMismatch, match="engine holds policy version 0, the trainer is at 1"):
        run_loop(tmp_path, dataclasses.replace(configuration(tmp_path), steps=3), [], Deaf([]))


def test_an_answer_of_an_older_policy_never_enters_the_loss(tmp_path):
    class Late(FakeEngine):
        def rollout(self, prompt, slot, index):
            one = super().rollout(prompt, slot, index)
            return dataclasses.replace(one, version=0) if (slot, index) == (1, 2) else one

    events: list[str] = []
    with pytest.raises(
        LogprobMismatch, match=r"1 rollouts were not .* version 1, the first \(prompt 1, rollout 2\) from"
    ):
        run_loop(tmp_path, dataclasses.replace(configuration(tmp_path), steps=3), events, Late(events))
    assert events[-1] == "generate (0, 2)", "nothing was trained on it"


def run_with_reward_model(tmp_path, metrics: dict, token_weights: TokenWeights, events: list) -> None:
    """Run two steps in which the reward model returns these values and the policy is not frozen."""

    class Scripted(FakeRewardModel):
        def update(self, batch):
            return token_weights, metrics

    class Policy(FakePolicy):
        def update(self, batch, reference_logp, token_weights):
            self.events.append("policy learns" if token_weights.valid else "policy skips")
            return {}

    config = c.Config(
        run=str(tmp_path / "run"), steps=2, policy_freeze_steps=0, guard=c.GuardConfig(max_consecutive_skips=1)
    )
    models = Policy("p", events), FakeModel("r", events), Scripted("m", events)
    loop.train(
        config, FakePrompts(), FakeEngine(events), FakeVerifier(), *models,
        FakeWeightSync(FakeEngine(events), events), Recorder(config), FakeHooks(events), SPEC,
    )  # fmt: skip


def test_the_policy_does_not_learn_from_a_reward_model_that_skipped_and_the_run_stops_after_dumping(tmp_path):
    events: list[str] = []
    metrics = {"loss/reward_model": float("nan"), "reward_model/skipped": 1, "reward_model/consecutive_skips": 1}
    with pytest.raises(c.RunStopped, match="step 0: the reward model has skipped 1 steps in a row"):
        run_with_reward_model(tmp_path, metrics, TokenWeights([], valid=False), events)
    assert events == ["generate (0, 0)", "policy skips"], "nothing was synced or saved"
    assert (tmp_path / "run/dumps/step_000000/share_000.safetensors").is_file()


def test_a_muted_side_and_calibration_are_recorded_before_the_policy_moves(tmp_path, capsys):
    metrics = {"weights/correct_mean": 0.4, "weights/incorrect_mean": 0.01}
    metrics |= {"weights/correct_zero_share": 0.3, "weights/incorrect_zero_share": 0.9}
    rollouts = (ScoredRollout(1, 0, True, 2.0), ScoredRollout(1, 1, False, 1.0))
    run_with_reward_model(tmp_path, metrics, TokenWeights([torch.ones(8)], rollouts=rollouts), [])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("the reward model mutes incorrect samples") == 1 and "step 0: the reward" in printed
    rows = [json.loads(line) for line in (tmp_path / "run/calibration.jsonl").read_text().splitlines()]
    assert [sum(row["counts"]) for row in rows] == [2, 2]


def test_broken_weights_reach_neither_the_engine_nor_a_checkpoint(tmp_path):
    events: list[str] = []
    metrics = {"reward_model/largest_weight": float("inf")}
    with pytest.raises(c.RunStopped, match="has weights that are not finite"):
        run_with_reward_model(tmp_path, metrics, TokenWeights([torch.ones(8)]), events)
    assert events == ["generate (0, 0)", "policy learns"]


def test_a_step_with_nothing_to_learn_from_is_counted_and_passed(tmp_path):
    class AllWrong(FakeVerifier):
        def verdicts(self, rollouts):
            return [[Verdict(Outcome.INCORRECT, "exact") for _ in row] for row in rollouts]

    events: list[str] = []
    config = configuration(tmp_path)
    loop.train(
        config, FakePrompts(), FakeEngine(events), AllWrong(), FakePolicy("p", events), FakeModel("r", events),
        FakeRewardModel("m", events), FakeWeightSync(FakeEngine([]), []), Recorder(config), FakeHooks([]), SPEC,
    )  # fmt: skip
    assert events == ["generate (0, 0)", "generate (0, 1)"]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["batch/mixed_prompts"] == 0 and rows[0]["reward/pass_rate"] == 0


def test_dumps_and_rollouts_are_bounded_without_checkpoints(tmp_path):
    config = configuration(tmp_path, checkpoint=c.CheckpointConfig(every=0))
    config = dataclasses.replace(config, steps=7, record=c.RecordConfig(dumps=2, rollouts=3))
    run_loop(tmp_path, config, [])
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "dumps").iterdir()) == ["step_000005", "step_000006"]
    assert sorted(path.stem for path in (run / "rollouts").iterdir()) == [f"step_00000{step}" for step in (4, 5, 6)]


def test_skipped_steps_stay_longer_but_not_without_end(tmp_path):
    dumps = StepDumps(c.Config(run=str(tmp_path), record=c.RecordConfig(dumps=2)), (0, 1))
    for step in range(12):
        folder = dumps.folder_of(step)
        folder.mkdir(parents=True)
        metrics = {"policy/consecutive_skips": step % 2}
        header = {"step": step, "shares": 1, "counts": {"sequences": 1, "action_tokens": 1, "correct_tokens": 1,
                  "incorrect_tokens": 0}, "metrics": metrics, "config": dataclasses.asdict(c.Config())}  # fmt: skip
        (folder / "step.json").write_text(json.dumps(header))
        dumps.delete_old(step + 1)
    assert sorted(int(path.name[5:]) for path in (tmp_path / "dumps").iterdir()) == [7, 9, 10, 11]


MUTE = {"batch/samples": 0, "reward/pass_rate": 0.0, "rollout/truncated_share": 0.875, "verify/unknown": 3}


@pytest.mark.parametrize(
    ("idle", "says"),
    [
        (MUTE, "no prompt has both correct and incorrect rollouts (pass rate 0.000, 88% truncated, 3 unknown)"),
        (MUTE | {"batch/samples": 8, "policy/gradient_norm": 0.0}, "the policy's gradient is 0"),
    ],
)
def test_a_run_that_trains_on_nothing_says_so_after_5_10_20_steps_and_at_its_end(idle, says):
    steps, busy = IdleSteps(), MUTE | {"batch/samples": 8, "policy/gradient_norm": 0.5}
    told = [number for number in range(1, 25) if steps.report(idle)]
    assert told == [5, 10, 20]
    assert steps.report(busy) == "" and not any(steps.report(idle) for _ in range(4))
    assert steps.report(idle) == f"5 steps in a row trained on nothing: {steps_cause(idle)}" and says in steps_cause(
        idle
    )
    assert steps.summary() == "29 of 30 steps trained on nothing" and IdleSteps().summary() == ""
    assert not steps_cause(MUTE | {"batch/samples": 8}), "a frozen policy has no gradient"
