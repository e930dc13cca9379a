"""A run that is killed while responses are in flight continues them: real Megatron and vLLM, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import make_addition_task
import pytest
import small_model
from gloo_processes import run_command

RECIPE = """
import os
import signal
from pathlib import Path

from oreal_megatron.config import *

def even(row, response):
    mark = Path("{folder}/generate")  # grading overlaps with generation, in a process of its own
    if mark.exists() and (Path(mark.read_text()) / "checkpoints/step_000002").is_dir():
        mark.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
    return len(response) % 2 == 0

def die_once(step, metrics, run):
    mark = Path("{folder}/between")
    if step == 2 and mark.exists():
        mark.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

def oreal():
    adam = OptimizerConfig(lr=1e-3, min_lr=1e-3, warmup_steps=0)
    return Config(
        run="{folder}/run",
        steps=5,
        policy_freeze_steps=0,
        tokens_per_micro_batch=1024,
        model=ModelConfig("{folder}/start"),
        engine=EngineConfig(max_model_len=160, max_num_seqs=64, kv_cache_gib=0.1, enforce_eager=True),
        sampling=SamplingConfig(rollouts_per_prompt=4, top_p=1.0, max_new_tokens=120),
        rollout=RolloutConfig(round_tokens=16, pool=2.0, staleness=2),
        data=DataConfig("{folder}/problems.jsonl", prompts_per_step=4),
        verify=VerifyConfig(workers=1, function=f"{{__file__}}:even"),
        loss=LossConfig(ratio_cap=2.0, ratio_tokens="carried"),
        optimizer=adam,
        reward_model=RewardModelConfig(optimizer=adam),
        checkpoint=CheckpointConfig(every=1, keep=9),
        record=RecordConfig(after_step=f"{{__file__}}:die_once"),
    )
"""
DEADLINE_S = 400.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with random weights, which ends one response in a hundred tokens, and a recipe that carries them."""
    folder = tmp_path_factory.mktemp("carried")
    small_model.make_model(folder / "start", seed=0, layers=2)
    make_addition_task.make_problems(folder, 0, training=60, held_out=4, demonstrations=4, below=30)
    (folder / "recipe.py").write_text(RECIPE.format(folder=folder))
    return folder


def results(run: Path) -> dict[str, object]:
    """Return metrics, rollouts and weights of a run, without what a clock wrote."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [{k: v for k, v in row.items() if "second" not in k and not k.startswith("speed/")} for row in rows],
        "rollouts": {file.name: file.read_text() for file in sorted((run / "rollouts").glob("*.jsonl"))},
        "policy": (run / "policy/model.safetensors").read_bytes(),
    }


def train(in_processes, *arguments: str) -> str:
    (code, printed), *_ = in_processes(1, run_command, "train", *arguments, timeout_s=DEADLINE_S)
    assert code == 0, printed
    return printed


def train_until_killed(folder: Path, run: Path, moment: str) -> None:
    """Run in a process of its own, which dies in its third step or a later one, with responses in flight."""
    (folder / moment).write_text(str(run))
    command = [sys.executable, "-m", "oreal_megatron", "train", f"{folder}/recipe.py:oreal", "--set", f"run={run}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=DEADLINE_S)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-4000:]
    assert not (folder / moment).exists()


@pytest.fixture(scope="module")
def unbroken(folder, in_processes) -> dict[str, object]:
    """The results of a run that nothing stops."""
    train(in_processes, f"{folder}/recipe.py:oreal")
    return results(folder / "run")


@pytest.mark.full
@pytest.mark.parametrize("moment", ["between", "generate"])
def test_a_killed_run_continues_its_responses(folder, in_processes, unbroken, moment):
    """Between two steps, or while the engine generates: after the first response that is graded."""
    assert all(row["rollout/carried_rollouts"] > 0 for row in unbroken["metrics"])
    assert max(row["rollout/earlier_version_share"] for row in unbroken["metrics"]) > 0
    assert all(row["batch/samples"] > 0 for row in unbroken["metrics"]), "a step without training shows nothing"
    run = folder / f"killed_{moment}"
    train_until_killed(folder, run, moment)
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    written = [int(file.stem.removeprefix("step_")) for file in (run / "rollouts").glob("*.jsonl")]
    assert max(logged) < 4 and max(written) == max(logged), "the step in which it died has not selected its rollouts"
    assert not (run / "policy").exists()
    train(in_processes, "--resume", str(run))
    assert results(run) == unbroken
