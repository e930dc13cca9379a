"""`oreal train` whose second rank is killed, or stopped, in the middle: the exit code, and who is named.

Takes a minute: `python -m pytest --full tests/faults/test_hang.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import make_addition_task
import pytest
import small_model

pytestmark = pytest.mark.full
RECIPE = """
from oreal_megatron.config import *

def oreal():
    return Config(
        run="{folder}/run", steps=1000, policy_freeze_steps=1, tokens_per_micro_batch=512,
        model=ModelConfig("{folder}/start"),
        engine=EngineConfig(max_model_len=32, max_num_seqs=64, kv_cache_gib=0.05, enforce_eager=True),
        sampling=SamplingConfig(rollouts_per_prompt=4, max_new_tokens=12), data=DataConfig("{folder}/problems.jsonl",
        prompts_per_step=8), verify=VerifyConfig(workers=1), watchdog=WatchdogConfig(silent_s=10.0))
"""


def rank_of(launcher: int, rank: int) -> int:
    """Process id of one rank, among the children of `oreal --processes`."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise LookupError(f"no rank {rank} under {launcher}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_of_a_real_run_is_named_and_the_code_is_5(number, tmp_path):
    small_model.make_model(tmp_path / "start", seed=0, layers=2)
    make_addition_task.make_problems(tmp_path, 0, training=200, held_out=60, demonstrations=600, below=30)
    (tmp_path / "recipes.py").write_text(RECIPE.format(folder=tmp_path))
    command = [sys.executable, "-m", "oreal_megatron", "--processes", "2", "train", f"{tmp_path}/recipes.py:oreal"]
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 1):
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        os.kill(rank_of(run.pid, 1), number)
        lost = time.monotonic()
        assert run.wait(timeout=60) == 5, (tmp_path / "log").read_text()[-3000:]
        assert time.monotonic() - lost < 30
    finally:
        run.kill()
    said = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("oreal: rank 1 is lost")]
    assert any("last seen in phase" in line and "Stacks of all ranks: " in line for line in said)
    (stacks,) = (tmp_path / "run/hang").glob("*/rank_0.txt")
    assert "oreal_megatron/loop.py" in stacks.read_text()
