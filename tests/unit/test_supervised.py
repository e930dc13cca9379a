"""`oreal sft`: when it stops, what a resumed run repeats, and what it may change."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch

from oreal_megatron import config as c
from oreal_megatron.algo import packing
from oreal_megatron.cli import main
from oreal_megatron.config import schema
from oreal_megatron.data.sampler import Sampler
from oreal_megatron.observe import dumps, run_report
from oreal_megatron.observe.page import demonstrations, page, tables
from oreal_megatron.observe.page.run_data import read
from oreal_megatron.observe.recorder import NO_WEIGHTS, Recorder
from oreal_megatron.records import PackingSpec, Sample
from oreal_megatron.training import supervised

SHARES = ("generate", "verify", "training", "sync", "other")
SAMPLES = [Sample((1,), (2, number), 1.0, 0.0, rollout=(number + 1, 0)) for number in range(7)]


class Policy:
    """A policy whose state depends on the order of all demonstrations so far."""

    def __init__(self, state: int = 0):
        self.state = state

    def imitate(self, batch) -> tuple[list, dict[str, float]]:
        for part in batch.micro_batches:
            self.state = (self.state * 31 + int((part.labels * (1 + part.positions[part.action_index])).sum())) % 10007
        return [part.labels.float() for part in batch.micro_batches], {"loss/total": float(self.state)}


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


def imitate(config: c.Config, accuracies: dict[int, float], first: int = 0, state: int = 0, share=None):
    run, policy = Recorder(config, first, dump_share=share), Policy(state)
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


def dumped_steps(run: Path) -> dict[int, list[demonstrations.Demonstration]]:
    written = [dumps.read_dump(folder) for folder in sorted((run / "dumps").iterdir())]
    assert all(dump.of_demonstrations for dump in written)
    return {dump.step: demonstrations.read(dump) for dump in written}


def test_a_dump_holds_the_demonstrations_of_its_step_with_the_log_prob_of_each_token(tmp_path):
    """As many as record.dumps; the scripted policy's log-probs are the tokens. A resumed run repeats its dumps."""
    config = dataclasses.replace(configuration(tmp_path), record=c.RecordConfig(dumps=4))
    _, states = imitate(config, {}, share=(0, 1))
    steps = dumped_steps(tmp_path / "run")
    assert list(steps) == [5, 6, 7, 8]
    for step, rows in steps.items():
        expected = {
            sample.rollout[0]: list(sample.response_tokens) for sample in Sampler(SAMPLES, 3, seed=1).take(step)
        }
        assert {row.line: row.tokens for row in rows} == expected and all(row.turn == 0 for row in rows)
        assert all(row.logp == row.tokens and row.loss == -sum(row.tokens) / 2 for row in rows)
        assert [row.loss for row in rows] == sorted((row.loss for row in rows), reverse=True)
    imitate(config, {}, 7, states[7], share=(0, 1))
    assert dumped_steps(tmp_path / "run") == steps


def test_the_page_of_a_run_without_rollouts_draws_nothing_of_them(tmp_path):
    """Neither rates of tokens nor phases that it does not have; they would be drawn as 0."""
    config = configuration(tmp_path)
    imitate(config, {})
    record = run_report.read_run(tmp_path / "run")
    names = {name for row in record.metrics for name in row}
    assert names == {"step", "loss/total", "seconds/policy", "seconds/step", *(f"speed/share/{p}" for p in SHARES)}
    page.write([record], tmp_path / "page.html", 0)
    time = (tmp_path / "page.html").read_text().partition('<section id="time">')[2].partition("</section>")[0]
    legends = re.findall(r"<li>.*?<span>([^<]*)</span>", time)
    assert legends == ["policy", "others"], "seconds by phase, and no chart of tokens per second"
    assert re.findall(r'<th scope="row">([^<]*)</th>', time) == ["policy", "other", "step"]
    assert not re.search(r"<td>0(\.0%)?</td>", time), "no idle share either"


def test_a_run_that_was_not_timed_has_no_seconds(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for name, content in (("config", dataclasses.asdict(c.Config())), ("environment", {}), ("metrics", {"step": 0})):
        (run / f"{name}.json{'l' * (name == 'metrics')}").write_text(json.dumps(content) + "\n")
    record = run_report.read_run(run)
    assert record.seconds is None and tables.overview([read(record, "run")]).endswith(
        "<td></td></tr></tbody></table></div>"
    )
    run_report.print_table([record])
    assert re.search(r"not evaluated +1 *\n", capsys.readouterr().out)


def test_a_run_whose_rank_reports_nothing_dumps_nothing(tmp_path):
    imitate(configuration(tmp_path), {})
    assert not (tmp_path / "run/dumps").exists()


def dump_of(run: Path, config: c.Config, logp: dict[int, list[float]]) -> Path:
    """Write a step of two replicas, the lines of the file with these log-probs."""
    folder = run / "dumps/step_000004"
    samples = [Sample((1,), (10 + line, 3), 1.0, 0.0, rollout=(line, 1)) for line in logp]
    for rank in range(2):
        batch = packing.batch(samples, PackingSpec(4, rank, 2))
        own = [
            [value for line, _ in part.rollouts.tolist() for value in logp.get(line, [])]
            for part in batch.micro_batches
        ]
        dumps.StepDumps(config, (rank, 2)).write(4, batch, None, NO_WEIGHTS, {}, [torch.tensor(row) for row in own])
    return folder


def test_the_page_lists_the_demonstrations_of_all_replicas_by_loss_and_replay_refuses_them(
    tmp_path, model_folder, capsys
):
    run = tmp_path / "run"
    config = c.Config(run=str(run), model=c.ModelConfig(str(model_folder)))
    (run / "rollouts").mkdir(parents=True)
    for name, content in (("config", dataclasses.asdict(config)), ("environment", {})):
        (run / f"{name}.json").write_text(json.dumps(content))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 4, "loss/total": 1.0}) + "\n")
    logp = {7: [-0.5, -0.25], 8: [-4.0, -1.0], 9: [math.nan, -1.0], 11: [-0.1, -3.0], 12: [-1.0, -1.0]}
    folder = dump_of(run, config, logp)
    assert main.main(["report", str(run), "--html", str(tmp_path / "out.html")]) == 0
    page = (tmp_path / "out.html").read_text()
    assert "demonstrations of step 4, 5 of 5, largest loss first" in page
    rows = re.findall(r'<tr><th scope="row">(\d+)</th><td>1</td><td>2</td>', page)
    assert list(map(int, rows)) == [9, 8, 11, 12, 7]  # a loss that is not a number is the largest
    assert demonstrations.Demonstration(9, 1, [19, 3], logp[9]).loss == math.inf
    capsys.readouterr()
    assert main.main(["replay", str(folder)]) == 2
    assert "is a step of `oreal sft` or `oreal distill`, which `oreal replay` does not" in capsys.readouterr().err
