"""`oreal sft`: when it stops, what a resumed run repeats, and what it may change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from oreal_megatron import config as c
from oreal_megatron.config import schema
from oreal_megatron.data.sampler import Sampler
from oreal_megatron.observe.recorder import Recorder
from oreal_megatron.records import PackingSpec, Sample
from oreal_megatron.training import supervised

SAMPLES = [Sample((1,), (2, number), 1.0, 0.0) for number in range(7)]


class Policy:
    """A policy whose state depends on the order of all demonstrations so far."""

    def __init__(self, state: int = 0):
        self.state = state

    def imitate(self, batch) -> dict[str, float]:
        for part in batch.micro_batches:
            self.state = (self.state * 31 + int((part.labels * (1 + part.positions[part.action_index])).sum())) % 10007
        return {"loss/total": float(self.state)}


class Hooks:
    """Evaluates every `every` steps with scripted accuracies, and keeps the policy's state after each step."""

    def __init__(self, run: Recorder, policy: Policy, accuracies: dict[int, float]):
        self.run, self.policy, self.accuracies, self.states = run, policy, accuracies, {}

    def after_step(self, steps_done: int) -> None:
        self.states[steps_done] = self.policy.state
        if steps_done in self.accuracies:
            self.run.metrics.log_evaluation(steps_done, {"accuracy": self.accuracies[steps_done]})


def configuration(tmp_path: Path, **changes) -> c.Config:
    section = c.SupervisedConfig(steps=9, samples_per_step=3, **changes)
    return c.Config(run=str(tmp_path / "run"), supervised=section)


def imitate(config: c.Config, accuracies: dict[int, float], first: int = 0, state: int = 0):
    run, policy = Recorder(config, first, dump_share=None), Policy(state)
    hooks = Hooks(run, policy, accuracies)
    if not first and 0 in accuracies:
        hooks.after_step(0)
    steps = supervised.imitate(config, Sampler(SAMPLES, 3, seed=1), policy, run, hooks, PackingSpec(10))
    return steps, hooks.states


@pytest.mark.parametrize(
    ("accuracies", "steps"),
    [
        ({0: 0.1, 2: 0.2, 4: 0.4, 6: 0.3, 8: 0.9}, 4),
        ({0: 0.1, 2: 0.2, 4: 0.3, 6: 0.39, 8: 0.1}, 9),
        ({0: 0.4}, 0),
        ({}, 9),
    ],
)
def test_it_stops_at_the_accuracy_or_after_the_last_step(accuracies, steps, tmp_path):
    config = configuration(tmp_path, evaluate_every=2, stop_at_accuracy=0.4)
    assert imitate(config, accuracies)[0] == steps
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines() if steps else []
    assert [json.loads(row)["step"] for row in rows] == list(range(steps))


@pytest.mark.parametrize("first", [1, 4, 8])
def test_a_resumed_run_visits_the_same_demonstrations_and_stops_at_the_same_step(first, tmp_path):
    config = configuration(tmp_path, evaluate_every=3, stop_at_accuracy=0.5)
    accuracies = {0: 0.1, 3: 0.2, 6: 0.3}
    _, states = imitate(config, accuracies)
    losses = (tmp_path / "run/metrics.jsonl").read_text().count("loss/total")
    steps, again = imitate(config, accuracies, first, states[first])
    assert steps == losses == 9 and again == {step: state for step, state in states.items() if step > first}


def test_what_another_order_of_demonstrations_would_come_from_is_fixed():
    classes = {key.path: key.on_resume for key in schema.config_keys(c.Config()) if key.path.startswith("supervised.")}
    assert classes["supervised.samples_per_step"] == "fixed" and classes["supervised.path"] == "fixed content"
    assert classes["supervised.steps"] == classes["supervised.optimizer.lr"] == "announced"
    assert classes["supervised.evaluate_every"] == classes["supervised.checkpoint_every"] == "free"


def test_settings_of_reinforcement_learning_do_not_stand_in_its_way():
    """A recipe that is valid for `oreal train` is valid for `oreal sft`, with fewer steps than a warm-up too."""
    optimizer = c.OptimizerConfig(warmup_steps=0)
    section = c.SupervisedConfig(path="x", steps=2, optimizer=optimizer, evaluate_every=1, checkpoint_every=5)
    recipe = dataclasses.replace(
        c.Config(),
        supervised=section,
        weights=c.WeightsConfig(shuffle=True),
        sampling=c.SamplingConfig(temperature=0.7),
    )
    assert not c.problems(recipe)
    changed = supervised.with_supervised_settings(recipe)
    assert not c.problems(changed)
    assert (changed.steps, changed.optimizer, changed.frozen_steps) == (2, optimizer, 0)
    assert (changed.sampling.temperature, changed.evaluation.every, changed.checkpoint.every) == (1.0, 1, 5)
