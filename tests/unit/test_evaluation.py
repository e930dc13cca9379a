"""Intervals, and reading run folders back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from oreal_megatron.cli import main
from oreal_megatron.config import Config, EvaluationConfig, SamplingConfig
from oreal_megatron.evaluation.score import evaluate, pass_rates
from oreal_megatron.evaluation.statistics import wilson_interval
from oreal_megatron.observe.recorder import Recorder
from oreal_megatron.observe.run_folder import SAVED_MODEL, model_note
from oreal_megatron.protocols import Metrics
from oreal_megatron.records import Outcome, Prompt, Rollout, Verdict


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)]
)
def test_wilson_interval_against_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_an_unknown_verdict_is_left_out_of_the_pass_rate_but_is_not_right():
    class Engine:
        def generate(self, prompts, sampling, seed, finished):
            rows = [[Rollout(p, s, k, (1,), "", True) for k in range(4)] for s, p in enumerate(prompts)]
            for row in rows:
                for rollout in row:
                    finished(rollout)
            return rows

    class Verifier:
        def submit(self, rollout):
            pass

        def verdicts(self, rollouts):
            outcomes = [[Outcome.CORRECT, Outcome.INCORRECT, Outcome.UNKNOWN, Outcome.UNKNOWN], [Outcome.UNKNOWN] * 4]
            return [[Verdict(outcome, "") for outcome in row] for row in outcomes]

    asked = [Prompt(i, "q", "1", None, (1,)) for i in range(2)]
    result = evaluate(asked, Engine(), Verifier(), Config())
    assert result["accuracy"] == 1 / 8 and result["unknown"] == 6
    verdicts = [["correct", "incorrect", "unknown", "unknown"], ["unknown"] * 4]
    rows = [{"problem": number, "verdict": verdict} for number, row in enumerate(verdicts) for verdict in row]
    assert pass_rates(rows) == {0: 0.5, 1: None}


def test_samples_are_evaluated_beside_the_greedy_response():
    """Greedy is right on every problem, a sample on every second one; both modes ask for their own responses."""
    requests = []

    class Engine:
        def generate(self, prompts, sampling, seed, on_rollout):
            requests.append((sampling.temperature, sampling.rollouts_per_prompt, sampling.max_new_tokens, seed))
            texts = ["1"] if sampling.temperature == 0 else ["1", "2"] * (sampling.rollouts_per_prompt // 2)
            return [[Rollout(p, s, k, (1,), t, True) for k, t in enumerate(texts)] for s, p in enumerate(prompts)]

    class Verifier:
        def submit(self, rollout):
            pass

        def verdicts(self, rollouts):
            return [
                [Verdict(Outcome.CORRECT if r.text == "1" else Outcome.INCORRECT, "") for r in row] for row in rollouts
            ]

    problems = [Prompt(number, "q", "1", None, (1,)) for number in range(5)]
    config = Config(seed=7, evaluation=EvaluationConfig(samples=4, max_new_tokens=9))
    result = evaluate(problems, Engine(), Verifier(), config)
    assert requests == [(0.0, 1, 9, (7, -1)), (1.0, 4, 9, (7, -1))]
    assert (result["accuracy"], result["answers"]) == (1.0, 5)
    assert (result["sampled_accuracy"], result["sampled_answers"], result["sampled_unknown"]) == (0.5, 20, 0)
    assert 0 < result["sampled_low"] < 0.5 < result["sampled_high"] < 1, "alike problems: the interval is no point"
    assert not [name for name in evaluate(problems, Engine(), Verifier(), Config()) if "sampled" in name]
    requests.clear()
    sampling = SamplingConfig(temperature=1.2)
    evaluate(problems, Engine(), Verifier(), dataclasses.replace(config, sampling=sampling))
    fixed = dataclasses.replace(config.evaluation, temperature=0.9)
    evaluate(problems, Engine(), Verifier(), dataclasses.replace(config, sampling=sampling, evaluation=fixed))
    assert [row[0] for row in requests] == [0.0, 1.2, 0.0, 0.9]


@pytest.mark.parametrize("sampled", [False, True])
def test_report_shows_samples_where_every_evaluation_has_them(sampled, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"seed": 3, "reward_model": {"enabled": True}}))
    (tmp_path / "environment.json").write_text(json.dumps({"imported": {}}))
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 0, "reward/pass_rate": 0.2, "seconds/step": 1.5}) + "\n"
    )
    rows = [{"step": step, "accuracy": 0.9, "low": 0.8, "high": 1.0, "answers": 50} for step in (0, 1)]
    for row, accuracy in zip(rows, (0.2, 0.35), strict=True):
        if sampled:
            row |= {"sampled_accuracy": accuracy, "sampled_low": accuracy - 0.1, "sampled_high": accuracy + 0.1}
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = tmp_path / "summary.json"
    assert main.main(["report", str(tmp_path), "--summary", str(summary), "--picture", str(tmp_path / "c.png")]) == 0
    assert ("+15.0" in capsys.readouterr().out) == sampled
    assert json.loads(summary.read_text()).get("sampled_accuracy_after") == (0.35 if sampled else None)


def png_width(path: Path) -> int:
    """Return the width in pixels that a PNG file states."""
    assert path.read_bytes()[:4] == b"\x89PNG"
    return int.from_bytes(path.read_bytes()[16:20], "big")


def test_report_draws_and_sums_up(tmp_path, capsys):
    run = tmp_path / "a"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"seed": 3, "reward_model": {"enabled": True}}))
    (run / "environment.json").write_text(json.dumps({"imported": {"megatron-core": "0.16.1", "vllm": "0.31.0"}}))
    metrics = [{"step": i, "reward/pass_rate": 0.2 + 0.1 * i, "seconds/step": 1.5} for i in range(4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    rows = [
        {"step": s, "accuracy": a, "low": a - 0.1, "high": a + 0.1, "answers": 50} for s, a in ((0, 0.25), (4, 0.5))
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture, summary = tmp_path / "curve.png", tmp_path / "summary.json"
    assert main.main(["report", str(run), "--picture", str(picture), "--summary", str(summary)]) == 0
    assert png_width(picture) == 1210, "accuracy and pass rate"
    assert "+25.0" in capsys.readouterr().out
    written = json.loads(summary.read_text())
    assert written.pop("speed")["phases"]["step"] == {"seconds": 1.5, "share": 1.0}, "rows of before it was measured"
    assert written == {
        "accuracy_before": 0.25, "accuracy_after": 0.5, "interval_before": [0.15, 0.35], "interval_after": [0.4, 0.6],
        "problems": 50, "steps": 4, "seed": 3, "reward_model": True, "megatron_core": "0.16.1", "vllm": "0.31.0",
        "seconds": 6.0,
    }  # fmt: skip


def test_report_on_a_folder_that_is_no_run(tmp_path, capsys):
    assert main.main(["report", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def log_and_save_best(run: Recorder, best: Path, rows: dict[int, Metrics], figure: str) -> list[float | None]:
    """Log evaluations; return the values that a figure of the best policy has when it is saved."""
    values = []
    for step, row in rows.items():
        run.metrics.log_evaluation(step, row)
        values.append(run.metrics.value_if_best(step, figure, best))
        if values[-1] is not None:
            best.mkdir(exist_ok=True)
            (best / SAVED_MODEL).write_text(model_note(step, **{figure: values[-1]})[SAVED_MODEL])
            assert run.metrics.value_if_best(step, figure, best) is None, "it is saved already"
    return values


@pytest.mark.parametrize("samples", [0, 2])
def test_the_best_policy_is_better_than_all_before_in_samples_if_there_are_any(samples, tmp_path):
    config = Config(run=str(tmp_path / "run"), evaluation=EvaluationConfig(samples=samples))
    saturated = {"accuracy": 1.0} if samples else {}
    rows = {step: {**saturated, config.evaluation.figure: value}
            for step, value in {0: 0.5, 10: 0.4, 20: 0.6, 30: 0.6, 40: 0.7}.items()}  # fmt: skip
    values = log_and_save_best(Recorder(config), tmp_path / "run/best", rows, config.evaluation.figure)
    assert values == [None, None, 0.6, None, 0.7]


def test_a_best_policy_of_another_figure_is_replaced_by_one_that_beats_the_figures_before_it(tmp_path):
    run, best = Recorder(Config(run=str(tmp_path / "run"))), tmp_path / "run/best"
    assert log_and_save_best(run, best, {0: {"accuracy": 0.5}, 10: {"accuracy": 0.9}}, "accuracy") == [None, 0.9]
    rows = {step: {"accuracy": 0.9, "sampled_accuracy": value} for step, value in {20: 0.3, 30: 0.2, 40: 0.4}.items()}
    assert log_and_save_best(run, best, rows, "sampled_accuracy") == [0.3, None, 0.4]


@pytest.mark.parametrize("seconds", [{}, {"seconds/step": 2.0}])
def test_a_supervised_run_is_reported_in_a_table(tmp_path, capsys, seconds):
    run = tmp_path / "sft"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"seed": 3, "reward_model": {"enabled": True}}))
    (run / "environment.json").write_text("{}")
    rows = [{"step": step, "loss/total": 3.0 - step, "policy/gradient_norm": 1.0} | seconds for step in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main.main(["report", str(run), "--picture", str(tmp_path / "curve.png")]) == 0
    assert png_width(tmp_path / "curve.png") == 605, "no panel for rollouts, which it has not"
    printed = " ".join(capsys.readouterr().out.split())
    assert "supervised" in printed and "not evaluated" in printed
    assert main.main(["report", str(run), "--summary", str(tmp_path / "summary.json")]) == 2
    assert "has no held-out evaluation" in capsys.readouterr().err
