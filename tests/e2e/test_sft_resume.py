"""`oreal sft` and `oreal distill`, interrupted and continued, end with the bytes of the uninterrupted run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import make_addition_task
import pytest
import small_model

from oreal_megatron.observe import dumps
from oreal_megatron.observe.page import demonstrations

RECIPE = """
from oreal_megatron.config import *

def sft():
    return Config(
        run="{folder}/sft",
        tokens_per_micro_batch=512,
        model=ModelConfig("{folder}/start", dtype="bfloat16"),
        engine=EngineConfig(max_model_len=32, kv_cache_gib=0.05),
        supervised=SupervisedConfig(
            path="{folder}/demonstrations.jsonl", steps=6, samples_per_step=250, checkpoint_every=2,
            optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4, warmup_steps=2),
        ),
        distillation=DistillationConfig("{folder}/teacher", layers=2, projection=True),
    )
"""


def oreal(*arguments: str, expected: int = 0) -> str:
    command = [sys.executable, "-m", "oreal_megatron", "--processes", "2", *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == expected, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout + result.stderr


def losses(run: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss/total"], row["policy/gradient_norm"]) for row in rows]


@pytest.mark.full
@pytest.mark.parametrize("command", ["sft", "distill"])
def test_a_resumed_fine_tuning_repeats_the_uninterrupted_one_bit_by_bit(command, tmp_path):
    """Six steps of 250 demonstrations of 600: the order changes between epochs. The teacher is narrower."""
    small_model.make_model(tmp_path / "start", seed=0, layers=2)
    small_model.make_model(tmp_path / "teacher", seed=1, layers=3, hidden=64, heads=(2, 2))
    make_addition_task.make_problems(tmp_path, 0, training=10, held_out=10, demonstrations=600, below=30)
    (tmp_path / "recipes.py").write_text(RECIPE.format(folder=tmp_path))
    oreal(command, f"{tmp_path}/recipes.py:sft")
    run, again = tmp_path / "sft", tmp_path / "again"
    assert [step for step, *_ in losses(run)] == list(range(6)) and losses(run)[-1][1] < losses(run)[0][1]
    shutil.copytree(run, again)
    dumped = demonstrations.read(dumps.read_dump(run / "dumps/step_000005"))
    mean = -sum(sum(row.logp) for row in dumped) / sum(len(row.logp) for row in dumped)
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    loss = metrics.get("loss/cross_entropy", metrics["loss/total"])
    assert len(dumped) == 250 and mean == pytest.approx(loss, rel=1e-4)
    assert sorted(path.name for path in (again / "checkpoints").iterdir())[-1] == "step_000006"
    output = oreal(command, "--resume", str(again), "--step", "4", "--set", "supervised.samples_per_step=9", expected=2)
    assert "supervised.samples_per_step" in output and losses(again) == losses(run)
    oreal(command, "--resume", str(again), "--step", "4")
    assert losses(again) == losses(run)
    assert (again / "policy/model.safetensors").read_bytes() == (run / "policy/model.safetensors").read_bytes()
    output = oreal(command, "--resume", str(again), "--set", "supervised.steps=7")
    assert "continues after step 6 with other settings: supervised.steps" in output and len(losses(again)) == 7
