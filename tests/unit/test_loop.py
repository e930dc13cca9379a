"""The loop with hand-written fakes: order of events, what is trained on, what stops the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from oreal_megatron import config as c
from oreal_megatron import loop
from oreal_megatron.algo.proof import PoliciesDiffer
from oreal_megatron.observe.run import Run, refuse_existing
from oreal_megatron.records import Outcome, Prompt, Rollout, Verdict

ANSWERS = 4


class FakePrompts:
    def take(self, step: int) -> list[Prompt]:
        return [Prompt(i, f"question {i}", str(i), None, (1, 2, i)) for i in range(3)]


class FakeEngine:
    """Says the index of the answer; reports log-probs of -1 for the first answer of each prompt."""

    def __init__(self, events: list, logprob: float = -1.0):
        self.events, self.logprob = events, logprob

    def generate(self, prompts, sampling, seed, finished):
        self.events.append(f"generate {seed}")
        rows = [
            [Rollout(p, s, k, (5, k), str(k), True, (self.logprob,) * 2 if k == 0 else None) for k in range(ANSWERS)]
            for s, p in enumerate(prompts)
        ]
        for row in rows:
            for rollout in row:
                finished(rollout)
        return rows


class FakeVerifier:
    """Answers below the prompt's number are right: prompt 0 has none, prompts 1 and 2 are mixed."""

    def __init__(self):
        self.submitted = 0

    def submit(self, rollout: Rollout) -> None:
        self.submitted += 1

    def verdicts(self, rollouts):
        def judge(rollout: Rollout) -> Verdict:
            return Verdict(Outcome.CORRECT if rollout.index < rollout.slot else Outcome.WRONG, "exact", rollout.text)

        return [[judge(rollout) for rollout in row] for row in rollouts]


class FakeModel:
    def __init__(self, name: str, events: list):
        self.name, self.events, self.updates = name, events, 0

    def score(self, batch):
        return [torch.full((len(part.labels),), -1.0) for part in batch.micro_batches]


class FakePolicy(FakeModel):
    def update(self, batch, reference_logp, weight):
        assert [len(w) for w in weight] == [len(r) for r in reference_logp]
        self.updates += 1
        self.events.append(f"policy {batch.counts.sequences} {batch.counts.right_tokens}")
        return {"loss/total": 1.0}


class FakeRewardModel(FakeModel):
    def update(self, batch):
        self.events.append("reward model")
        return [torch.ones(len(part.labels)) for part in batch.micro_batches], {"reward_model/accuracy": 0.5}


def run_loop(tmp_path: Path, config: c.Config, events: list, engine=None, first: int = 0):
    policy = FakePolicy("policy", events)
    loop.train(
        config,
        FakePrompts(),
        engine or FakeEngine(events),
        FakeVerifier(),
        policy,
        FakeModel("reference", events),
        FakeRewardModel("reward model", events),
        lambda: events.append("hand over"),
        Run(config, first),
        lambda done: events.append(f"after {done}"),
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
        "hand over",
        "after 2",
    ]


def test_run_folder_holds_what_happened(tmp_path):
    config = configuration(tmp_path)
    run_loop(tmp_path, config, [])
    folder = tmp_path / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[1]["reward/pass_rate"] == pytest.approx(3 / 12) and rows[1]["batch/kept_prompts"] == 2
    assert {"seconds/generate", "seconds/policy", "tokens_per_second/policy", "loss/total"} <= rows[1].keys()
    rollouts = [json.loads(line) for line in (folder / "rollouts/step_000001.jsonl").read_text().splitlines()]
    assert len(rollouts) == 12 and [r["verdict"] for r in rollouts].count("correct") == 3
    assert json.loads((folder / "config.json").read_text())["policy_freeze_steps"] == 1
    assert "git_commit" in json.loads((folder / "environment.json").read_text())
    assert list((folder / "tensorboard").iterdir())
    with pytest.raises(c.ConfigError, match="exists already"):
        refuse_existing(config)


def test_a_resumed_run_writes_its_steps_once(tmp_path):
    config = configuration(tmp_path)
    run_loop(tmp_path, config, [])
    events: list[str] = []
    run_loop(tmp_path, config, events, first=1)
    assert events[0] == "generate (0, 1)"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]


def test_without_a_reward_model_nothing_is_frozen(tmp_path):
    events: list[str] = []
    run_loop(tmp_path, configuration(tmp_path, reward_model=c.RewardModel(enabled=False)), events)
    assert events.count("hand over") == 2


def test_an_engine_with_other_weights_stops_the_run_before_anything_is_trained(tmp_path):
    events: list[str] = []
    with pytest.raises(PoliciesDiffer, match=r"step 0: .* of 6 sampled tokens differ by 0\.5 nats"):
        run_loop(tmp_path, configuration(tmp_path), events, FakeEngine(events, logprob=-1.5))
    assert events == ["generate (0, 0)"]


def test_nan_log_probs_are_a_disagreement(tmp_path):
    with pytest.raises(PoliciesDiffer):
        run_loop(tmp_path, configuration(tmp_path), [], FakeEngine([], logprob=float("nan")))


def test_a_step_with_nothing_to_learn_from_is_counted_and_passed(tmp_path):
    class AllWrong(FakeVerifier):
        def verdicts(self, rollouts):
            return [[Verdict(Outcome.WRONG, "exact") for _ in row] for row in rollouts]

    events: list[str] = []
    config = configuration(tmp_path)
    loop.train(
        config, FakePrompts(), FakeEngine(events), AllWrong(), FakePolicy("p", events), FakeModel("r", events),
        FakeRewardModel("m", events), lambda: events.append("hand over"), Run(config), lambda done: None,
    )  # fmt: skip
    assert events == ["generate (0, 0)", "generate (0, 1)"]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["batch/kept_prompts"] == 0 and rows[0]["reward/pass_rate"] == 0
