"""The recipe of docs/how_to/extensions.md: its reward grades, its metric and its hook run with the loop."""

from __future__ import annotations

import dataclasses
import json
import logging

import fake_run
import pytest
from repository import ROOT

from oreal_megatron import config as c
from oreal_megatron import settings
from oreal_megatron.observe.user_hooks import UserHooks
from oreal_megatron.session.inputs import read_inputs
from oreal_megatron.verify.grader import Grader

RECIPE = ROOT / "examples/recipes/own_reward.py"
LINES = [{"question": f"Use these: {word}, b", "domain": "words", "words": [word, "b"]} for word in "acdefgh"] + [
    {"question": "1+1?", "domain": "mathematics", "gold_answer": "2"},
    {"question": "?", "domain": "other"},
]


@pytest.fixture
def config(model_folder, tmp_path, monkeypatch) -> c.Config:
    monkeypatch.setenv("OREAL_RUNS", str(tmp_path))
    monkeypatch.setenv("OREAL_DATA", str(tmp_path))
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    config = settings.from_recipe(f"{RECIPE}:own_reward")
    return dataclasses.replace(
        config,
        steps=3,
        policy_freeze_steps=1,
        model=c.ModelConfig(str(model_folder)),
        data=dataclasses.replace(config.data, prompts_per_step=4),
        engine=c.EngineConfig(max_model_len=256),
        sampling=c.SamplingConfig(rollouts_per_prompt=4, max_new_tokens=8),
        optimizer=c.OptimizerConfig(warmup_steps=1),
        reward_model=c.RewardModelConfig(optimizer=c.OptimizerConfig(warmup_steps=1)),
    )


def test_the_recipe_is_short():
    assert len(RECIPE.read_text().splitlines()) < 60


def test_the_reward_decides_by_the_fields_of_the_row(config):
    prompts = {json.loads(prompt.row)["domain"]: prompt for prompt in read_inputs(config).prompts(config.data.path)}
    cases = [("words", "b H", "correct"), ("words", "b", "incorrect"), ("words", "h b " * 30, "incorrect"),
             ("mathematics", "\\boxed{\\frac{4}{2}}", "correct"), ("mathematics", "\\boxed{3}", "incorrect"),
             ("other", "x", "unknown")]  # fmt: skip
    with Grader(config.verify) as grader:
        futures = [grader.submit(prompts[d].gold, text, True, "", prompts[d].row) for d, text, _ in cases]
        assert [future.result(timeout=60).outcome.value for future in futures] == [outcome for *_, outcome in cases]


def test_metric_and_hook_run_after_each_step(config, tmp_path):
    assert fake_run.train(config)
    rows = [json.loads(line) for line in (tmp_path / "own_reward/metrics.jsonl").read_text().splitlines()]
    assert [row["own/words_mean"] for row in rows] == [1.0] * 3
    assert (tmp_path / "own_reward/pass_rate.txt").read_text() == f"2 {rows[-1]['reward/pass_rate']:.3f}\n"
    recorded = json.loads((tmp_path / "own_reward/environment.json").read_text())["functions"]
    assert {source["text"] for source in recorded.values()} == {RECIPE.read_text()}
    assert set(recorded) == {"verify.function", "record.metric", "record.after_step"}


@pytest.mark.parametrize(
    ("body", "metrics", "says"),
    [
        ("return {'a': 1, 'b': True}", {"own/a": 1.0, "own/b": 1.0}, ""),
        ("return {'a': 'x', 'b': 2}", {"own/b": 2.0}, "a is 'x'; expected a number"),
        ("return [1]", {}, "it returned list; expected a dictionary of numbers"),
        ("raise ValueError('of the user')", {}, "ValueError: of the user"),
        ("return None", {}, ""),
    ],
)
def test_a_failing_metric_is_told_once_and_never_stops_a_run(body, metrics, says, tmp_path, caplog):
    (tmp_path / "own.py").write_text(f"def metric(rollouts, verdicts):\n    {body}\n")
    hooks = UserHooks(c.RecordConfig(metric=f"{tmp_path}/own.py:metric"))
    with caplog.at_level(logging.WARNING):
        assert hooks.metrics([], []) == hooks.metrics([], []) == metrics
    assert [says in record.getMessage() for record in caplog.records] == [True] * bool(says)


def test_a_failing_step_hook_never_stops_a_run(config, tmp_path, caplog):
    (tmp_path / "own.py").write_text(
        "def after(step, metrics, run):\n    metrics.clear()\n    raise SystemError(step)\n"
    )
    record = c.RecordConfig(after_step=f"{tmp_path}/own.py:after")
    with caplog.at_level(logging.WARNING):
        assert fake_run.train(dataclasses.replace(config, record=record))
    assert [r.getMessage() for r in caplog.records if "after_step" in r.getMessage()] == [
        f"record.after_step failed, and the run continues: SystemError: {step}" for step in range(3)
    ]
