"""Fine-tune, train, stop and resume, replay, convert, evaluate; what the commands leave behind.

Training runs under torchrun as a user starts it. The other commands run in processes that are forked with all libraries
imported, because importing them costs a process 20 CPU seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import make_addition_task
import pytest
import small_model
from gloo_processes import run_command

from oreal_megatron.config import Config
from oreal_megatron.doctor import checks
from oreal_megatron.observe import metric_table
from oreal_megatron.runtime import rollout_files

RECIPE = """
from oreal_megatron.config import *

BASE = dict(
    steps=4,
    policy_freeze_steps=1,
    tokens_per_micro_batch=512,
    model=ModelConfig("{folder}/start"),
    parallel=ParallelConfig(tensor={tensor}),
    engine=EngineConfig(tensor={tensor}, max_model_len=32, max_num_seqs=64, kv_cache_gib=0.05, enforce_eager=True),
    sampling=SamplingConfig(rollouts_per_prompt=4, top_p=1.0, max_new_tokens=12),
    data=DataConfig("{folder}/problems.jsonl", "{folder}/held_out.jsonl", prompts_per_step=24),
    verify=VerifyConfig(workers=1),
    optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=1),
    reward_model=RewardModelConfig(optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=1)),
    checkpoint=CheckpointConfig(every=2, keep=2),
    evaluation=EvaluationConfig(every=2, max_new_tokens=12),
)

def sft():
    return Config(run="{folder}/sft", supervised=SupervisedConfig(
        path="{folder}/demonstrations.jsonl", steps=250, samples_per_step=64, evaluate_every=10, stop_at_accuracy=0.1,
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-3, warmup_steps=10)), **BASE)

def oreal():
    return Config(run="{folder}/oreal", **BASE | dict(model=ModelConfig("{folder}/sft/policy")))
"""


def oreal(*arguments: str, processes: int = 2, expected: int = 0) -> str:
    """Run the command; what it printed."""
    several = ["--processes", str(processes)] if processes > 1 else []
    result = subprocess.run(
        [sys.executable, "-m", "oreal_megatron", *several, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == expected, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def forked_oreal(in_processes) -> Callable[..., str]:
    """Run the command in forked processes; what the ranks printed."""

    def run(*arguments: str, processes: int = 2, expected: int = 0) -> str:
        ranks = in_processes(processes, run_command, *arguments, timeout_s=600)
        printed = "".join(text for _, text in ranks)
        assert {code for code, _ in ranks} == {expected}, printed
        return printed

    return run


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Lines of a run, without what a clock wrote."""
    read = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k and not k.startswith("speed/")} for row in read]


@pytest.fixture(
    scope="module", params=[1, pytest.param(2, marks=pytest.mark.full)], ids=["data parallel", "tensor parallel"]
)
def trained(request, tmp_path_factory, forked_oreal) -> Path:
    folder = tmp_path_factory.mktemp("e2e")
    small_model.make_model(folder / "start", seed=0, layers=2)
    make_addition_task.make_problems(folder, 0, training=200, held_out=60, demonstrations=600, below=30)
    (folder / "recipes.py").write_text(RECIPE.format(folder=folder, tensor=request.param))
    forked_oreal("sft", f"{folder}/recipes.py:sft")
    oreal("train", f"{folder}/recipes.py:oreal")
    return folder


def trained_tensor(run: Path) -> int:
    return json.loads((run / "config.json").read_text())["engine"]["tensor"]


def test_a_run_leaves_everything_behind(trained):
    run = trained / "oreal"
    steps = rows(run)
    assert [row["step"] for row in steps] == [0, 1, 2, 3]
    assert all(row["parity/logprob_gap"] < 1e-5 and row["parity/tokens"] > 0 for row in steps)
    assert steps[-1]["weight_sync/direct"] == 1 and steps[-1]["weight_sync/verified_parameters"] > 10
    assert "loss/kl" not in steps[0] and steps[0]["loss/reward_model"] > 0, (
        "the first step trains the reward model alone"
    )
    wanted = {
        "reward/mean", "reward/pass_rate", "batch/mixed_prompts", "verify/unknown", "loss/positive", "loss/negative",
        "loss/kl", "loss/reward_model", "policy/gradient_norm", "reward_model/gradient_norm", "policy/learning_rate",
        "reward_model/learning_rate", "rollout/response_tokens_mean", "rollout/truncated_share", "policy/reference_kl",
        "policy/entropy_estimate", "reward_model/accuracy",
    }  # fmt: skip
    assert wanted <= steps[-1].keys()
    accuracies = [row["accuracy"] for row in rows(run, "evaluations.jsonl")]
    assert [row["step"] for row in rows(run, "evaluations.jsonl")] == [0, 2, 4]
    assert (run / "best/model.safetensors").is_file() == (max(accuracies[1:]) > accuracies[0])
    if accuracies[2] > max(accuracies[:2]):
        assert (run / "best/model.safetensors").read_bytes() == (run / "policy/model.safetensors").read_bytes()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "latest", "step_000002", "step_000004"
    ]  # fmt: skip
    replicas = {len(files) for files in rollout_files.complete_steps(run).values()}
    assert len(rollout_files.complete_steps(run)) == 4 and replicas == {2 // trained_tensor(run)}, "each wrote its own"
    held = sum(file.stat().st_size for file in (run / "checkpoints/step_000004").rglob("*") if file.is_file())
    assert held == pytest.approx(checks.checkpoint_bytes(Config(), run / "policy"), rel=0.05)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["imported"]["megatron-core"].startswith("0.16.1") and environment["imported"]["vllm"]
    assert environment["recipe"]["text"] == (trained / "recipes.py").read_text()
    assert environment["command"].endswith(f"train {trained}/recipes.py:oreal")
    logged = {name for line in (run / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert not [name for name in sorted(logged - {"step"}) if metric_table.find(name) is None]


OWN = """

def reward(row, response):
    return str(row["gold_answer"]) in response

def metric(rollouts, verdicts):
    return {"correct": sum(verdict.outcome.value == "correct" for row in verdicts for verdict in row)}

def after_step(step, metrics, run):
    open(f"{run}/hook.txt", "a").write(f"{step} {metrics['own/correct']}\\n")

def own():
    functions = RecordConfig(metric=f"{__file__}:metric", after_step=f"{__file__}:after_step")
    verify = VerifyConfig(workers=1, function=f"{__file__}:reward")
    return dataclasses.replace(oreal(), run=oreal().run + "_own", verify=verify, record=functions, steps=2)
"""


@pytest.mark.full
def test_functions_of_the_recipe_run_and_a_changed_reward_is_refused_on_resume(trained):
    recipe, run = trained / "own.py", trained / "oreal_own"
    recipe.write_text("import dataclasses\n" + (trained / "recipes.py").read_text() + OWN)
    oreal("train", f"{recipe}:own")
    steps = rows(run)
    assert (run / "hook.txt").read_text() == "".join(f"{row['step']} {row['own/correct']}\n" for row in steps)
    for step in steps:
        rollouts = [row for _, row in rollout_files.read(rollout_files.complete_steps(run)[step["step"]])]
        assert {row["method"] for row in rollouts} <= {"function", "truncated"}
        decided = [row for row in rollouts if row["method"] == "function"]
        assert decided and all(
            (row["verdict"] == "correct") == (row["gold_answer"] in row["response"]) for row in decided
        )
        assert sum(row["verdict"] == "correct" for row in rollouts) == step["own/correct"]
    recipe.write_text(recipe.read_text().replace(" in response", " == response"))
    output = oreal("train", "--resume", str(run), "--set", "steps=4", expected=2)
    assert "verify.function has other contents than when" in output


def test_a_run_says_how_fast_it_was(trained):
    found = json.loads((trained / "oreal/speed.json").read_text())
    assert {"device", "gpus", "nodes"} == found["hardware"].keys() and found["hardware"]["nodes"] == 1
    assert found["steps"] == {"logged": 4, "counted": 3, "first": 1} and found["bubble"] == 0
    phases = found["phases"]
    assert all(phases[name]["tflops_per_second_per_gpu"] > 0 for name in ("reward_model", "reference", "policy"))
    assert "mfu" not in phases["policy"], "no peak is known of a CPU"
    assert 0 <= phases["generate"]["idle"] < 1 and phases["other"]["share"] < 0.5


def test_the_policy_is_a_hugging_face_folder_that_moved(trained):
    import torch
    from transformers import AutoModelForCausalLM

    before, after = (
        AutoModelForCausalLM.from_pretrained(trained / name / "policy").state_dict() for name in ("sft", "oreal")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_by_bit(trained, forked_oreal):
    run, again = trained / "oreal", trained / "again"
    shutil.copytree(run, again)
    damaged = next((again / "checkpoints/step_000004/policy").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    refused = forked_oreal("train", "--resume", str(again), expected=2)
    assert f"policy/{damaged.name} has" in refused and "resume from step_000002 with --step 2" in refused
    forked_oreal("train", f"{trained}/recipes.py:oreal", "--resume", "auto", "--set", f"run={again}")
    assert rows(again) == rows(run)
    texts = [{file.name: file.read_text() for file in (of / "rollouts").iterdir()} for of in (again, run)]
    assert texts[0] == texts[1] and len(texts[0]) >= 4
    assert (again / "policy/model.safetensors").read_bytes() == (run / "policy/model.safetensors").read_bytes()


def test_the_last_checkpoint_converts_to_the_policy_and_to_a_token_classifier(trained, tmp_path, forked_oreal):
    from transformers import AutoModelForTokenClassification

    run = trained / "oreal"
    for name in ("policy", "reward_model"):
        forked_oreal("convert", "to-hf", str(run / "checkpoints/step_000004" / name), str(tmp_path / name), processes=1)
    policy = (tmp_path / "policy/model.safetensors").read_bytes()
    assert policy == (run / "policy/model.safetensors").read_bytes()
    judge, report = AutoModelForTokenClassification.from_pretrained(tmp_path / "reward_model", output_loading_info=True)
    assert judge.config.num_labels == 1 and not any(report.values())


@pytest.mark.parametrize("trained", [1], ids=["data parallel"], indirect=True)
def test_a_step_can_be_replayed_and_a_difference_is_found_at_another_layout_too(trained, forked_oreal):
    dump = trained / "oreal/dumps/step_000003"
    assert "reproduced bit for bit" in forked_oreal("replay", str(dump))
    changed = json.loads((dump / "step.json").read_text())
    changed["metrics"]["loss/kl"] *= 1.001
    (dump / "step.json").write_text(json.dumps(changed))
    printed = forked_oreal("replay", str(dump), processes=1, expected=1)
    assert "not reproduced: the largest relative difference is 0.000999, in loss/kl" in printed


@pytest.mark.full
@pytest.mark.parametrize("trained", [1], ids=["data parallel"], indirect=True)
def test_a_reward_model_that_blows_up_stops_the_run_and_is_replayed(trained):
    run, huge = trained / "blown", "1e30"
    changes = ("guard.max_consecutive_skips=2", "policy_freeze_steps=0", "data.held_out=", f"run={run}",
               f"reward_model.optimizer.lr={huge}", f"reward_model.optimizer.min_lr={huge}")  # fmt: skip
    assignments = [word for change in changes for word in ("--set", change)]
    printed = oreal("train", f"{trained}/recipes.py:oreal", *assignments, expected=3)
    assert "step 2: the reward model has skipped 2 steps in a row" in printed
    first, second = rows(run)
    assert (first["policy/skipped"], second["policy/skipped"], second["reward_model/skipped"]) == (0, 1, 1)
    assert second["reward_model/updates"] == first["policy/updates"] == 1
    assert "reproduced bit for bit" in oreal("replay", str(run / "dumps/step_000002"))


@pytest.mark.full
@pytest.mark.parametrize("trained", [1], ids=["data parallel"], indirect=True)
@pytest.mark.parametrize("recipe", ["grpo", "dapo"])
def test_a_baseline_recipe_trains_with_its_own_loss_and_four_updates_a_step(trained, recipe):
    run, file = trained / recipe, Path(__file__).parents[2] / f"examples/recipes/{recipe}.py"
    changes = (f"run={run}", "steps=2", f"model.path={trained}/sft/policy", f"data.path={trained}/problems.jsonl",
               f"data.held_out={trained}/held_out.jsonl", "data.prompts_per_step=24", "sampling.rollouts_per_prompt=4",
               "sampling.max_new_tokens=12", "tokens_per_micro_batch=512", "engine.max_model_len=32",
               "optimizer.warmup_steps=1", "engine.max_num_seqs=64", "engine.kv_cache_gib=0.05",
               "checkpoint.every=0")  # fmt: skip
    oreal("train", f"{file}:{recipe}", *[word for change in changes for word in ("--set", change)])
    first, second = rows(run)
    assert (first["policy/updates"], second["policy/updates"]) == (4, 8), "an update of each mini-batch"
    assert first["policy/skipped"] == second["policy/skipped"] == 0 and first["policy/gradient_norm"] > 0
    assert max(row["parity/logprob_gap"] for row in (first, second)) < 1e-5
    assert 0 <= min(row["own/clipped_share"] for row in (first, second)) < 1
    assert "loss/reward_model" not in first
    assert first["loss/kl"] > 0 if recipe == "grpo" else first["loss/total"] == first["loss/term"]
    assert "reproduced bit for bit" in oreal("replay", str(run / "dumps/step_000001"))
    before, after = (trained / name / "policy/model.safetensors" for name in ("sft", recipe))
    assert before.read_bytes() != after.read_bytes()


@pytest.mark.parametrize("trained", [1], ids=["data parallel"], indirect=True)
def test_a_checkpoint_is_evaluated_as_it_was_during_training(trained, tmp_path, forked_oreal):
    run, out, suite = trained / "oreal", tmp_path / "evaluation", str(trained / "held_out.jsonl")
    printed = forked_oreal("evaluate", str(run / "checkpoints/step_000004"), "--suite", suite, "--out", str(out),
                 "--training", str(trained / "problems.jsonl"), "--samples", "2",
                 processes=json.loads((run / "config.json").read_text())["engine"]["tensor"])  # fmt: skip
    scores = json.loads((out / "results.json").read_text())["suites"][suite]
    assert scores["greedy"]["accuracy"] == pytest.approx(rows(run, "evaluations.jsonl")[-1]["accuracy"], abs=1e-9)
    assert scores["sampled"][
        "answers_per_problem"
    ] == 2 and "0 of 60 problems occur in the training prompts" in " ".join(printed.split())
    assert len((out / "held_out.sampled.jsonl").read_text().splitlines()) == 120


@pytest.mark.full
@pytest.mark.parametrize("trained", [1], ids=["data parallel"], indirect=True)
def test_a_disturbed_job_ends_as_an_undisturbed_one(trained):
    """The fault campaign of docs/how_to/operations.md, shortened."""
    command = [
        sys.executable,
        Path(__file__).parents[2] / "tools/fault_campaign.py",
        "--folder",
        trained,
        "--steps",
        "8",
    ]
    faults = ["--runs", "1", "--seed", "5", "--faults", "kill a rank, torchrun restarts"]
    result = subprocess.run([*command, *faults], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "1 of 1 equal bit by bit" in result.stdout
