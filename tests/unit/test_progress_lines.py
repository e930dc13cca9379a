"""Progress lines and the last words of a run: the figures that a person looks at first."""

from __future__ import annotations

import dataclasses
import json

import fake_run
import pytest

from oreal_megatron import config as c
from oreal_megatron.observe import run_report
from oreal_megatron.observe.progress import step_note

METRICS = {
    "batch/samples": 96,
    "reward/pass_rate": 0.41249,
    "policy/reference_kl": 0.012345,
    "rollout/response_tokens_mean": 1830.6,
    "speed/tokens_per_second_per_gpu/step": 1234.4,
    "loss/total": 1.0,
}


def test_a_line_has_accuracy_kl_length_and_speed():
    note = step_note(METRICS, 0.3333)
    assert note == "pass rate 0.412, held-out 33.3%, KL 0.0123, 1831 tokens/response, 1234 tokens/s/GPU, 96 samples"
    assert step_note({"reward/pass_rate": 0.5}, None) == "pass rate 0.500", "a step without samples has no KL"


def test_a_run_ends_with_where_the_policy_is_and_what_to_look_at(model_folder, tmp_path, capsys):
    rows = [{"question": f"{a}+{b}=", "gold_answer": str(a + b)} for a in range(3) for b in range(4)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = c.Config(
        run=str(tmp_path / "run"),
        steps=4,
        policy_freeze_steps=1,
        model=c.ModelConfig(str(model_folder)),
        engine=c.EngineConfig(max_model_len=64),
        sampling=c.SamplingConfig(rollouts_per_prompt=4, max_new_tokens=8),
        data=c.DataConfig(*[str(tmp_path / "problems.jsonl")] * 2, prompts_per_step=4),
        optimizer=c.OptimizerConfig(warmup_steps=1),
        reward_model=c.RewardModelConfig(optimizer=c.OptimizerConfig(warmup_steps=1)),
        evaluation=c.EvaluationConfig(every=2, max_new_tokens=8),
    )
    assert fake_run.train(config, accuracies={0: 0.25, 1: 0.5, 3: 0.375})
    output, run = capsys.readouterr().out, tmp_path / "run"
    assert output.startswith("train run 4/4 (")
    assert "held-out 50.0%" in output.splitlines()[0], "that of the last evaluation before the line"
    assert f"policy: {run}/policy (held-out accuracy 37.5%, 25.0% before training)" in output
    assert f"best policy: {run}/best (held-out accuracy 50.0% after step 2)" in output
    assert output.rstrip().splitlines()[-1].startswith(f"next: oreal report {run} --html {run}/report.html")


def test_a_run_that_samples_ends_with_the_accuracy_of_samples(tmp_path):
    rows = [
        {"step": step, "accuracy": 1.0, "sampled_accuracy": value} for step, value in ((0, 0.25), (2, 0.5), (4, 0.375))
    ]
    (tmp_path / "best").mkdir()
    text = run_report.closing(run_report.RunRecord(str(tmp_path), {}, {}, [], rows, frozenset()))
    assert f"policy: {tmp_path}/policy (held-out accuracy of samples 37.5%, 25.0% before training)" in text
    assert f"best policy: {tmp_path}/best (held-out accuracy of samples 50.0% after step 2)" in text


@pytest.mark.parametrize("evaluations", [[], [{"step": 0, "accuracy": 0.5, "low": 0, "high": 1, "answers": 9}]])
def test_a_run_without_evaluations_ends_likewise(evaluations, tmp_path):
    record = run_report.RunRecord(str(tmp_path), {}, {}, [], evaluations, frozenset())
    (tmp_path / "best").mkdir()
    for text in (run_report.closing(record), run_report.closing(dataclasses.replace(record, evaluations=[]))):
        assert f"policy: {tmp_path}/policy" in text and text.count("\n") == 2
