"""Ctrl-C and errors in a real job of two processes: what is saved, what is said, what stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from gloo_processes import run_command

RECIPE = """
from oreal_megatron.config import *

def job():
    return Config(
        run="{folder}/run", steps=500, policy_freeze_steps=0, tokens_per_micro_batch=512, model=ModelConfig("{model}"),
        engine=EngineConfig(max_model_len=32, max_num_seqs=16, kv_cache_gib=0.05, enforce_eager=True),
        sampling=SamplingConfig(rollouts_per_prompt=2, top_p=1.0, max_new_tokens=8),
        data=DataConfig("{folder}/problems.jsonl", prompts_per_step=2), verify=VerifyConfig(workers=1),
        checkpoint=CheckpointConfig(every=0), optimizer=OptimizerConfig(warmup_steps=1),
        reward_model=RewardModelConfig(optimizer=OptimizerConfig(warmup_steps=1)),
    )
"""


def mapped_shared_memory() -> set[str]:
    """Names in /dev/shm that a living process has mapped: other tests run on this machine too."""
    names: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            names |= set(re.findall(r"/dev/shm/(\S+)", maps.read_text()))
    return names


# sitecustomize.py of a job with an error in its second step. A recipe may not replace functions of the package.
BROKEN = """
from oreal_megatron.algo import selection

samples = selection.samples

def fail_in_the_second_step(rollouts, verdicts, config, seed):
    if seed[1] == 1:
        raise ZeroDivisionError("planted in the second step")
    return samples(rollouts, verdicts, config, seed)

selection.samples = fail_in_the_second_step
"""


def shared_memory_left(before: set[str]) -> set[str]:
    """Names in /dev/shm that are new, and that no living process has mapped."""
    return set(os.listdir("/dev/shm")) - before - mapped_shared_memory()


class Job:
    """A real `oreal --processes 2` job in a session of its own, as a terminal would start it."""

    def __init__(self, folder: Path, model: Path):
        self.folder = folder
        self.temporary = Path(tempfile.mkdtemp(prefix="t"))  # short: the name of a socket has 107 characters
        self.shared_memory = set(os.listdir("/dev/shm"))
        lines = [{"question": f"{n}+{n}=", "gold_answer": str(2 * n), "pass_rate": 0.5} for n in range(8)]
        (folder / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "recipe.py").write_text(RECIPE.format(folder=folder, model=model))

    def start(self, *arguments: str, processes: int = 2) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}
        environment["PYTHONPATH"] = os.pathsep.join([str(self.folder), *os.environ.get("PYTHONPATH", "").split(":")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "oreal_megatron", "--processes", str(processes), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def wait_for_steps(self, steps: int) -> None:
        metrics, deadline = self.folder / "run/metrics.jsonl", time.monotonic() + 240
        while not metrics.is_file() or metrics.read_text().count("\n") < steps:
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()[0]
            time.sleep(0.1)

    def ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)  # the terminal sends it to every process in the foreground

    def end(self) -> tuple[int, str]:
        """Wait for the job; return exit code and output. Nothing of it may be left."""
        output, _ = self.process.communicate(timeout=240)
        sessions = subprocess.run(["ps", "-eo", "sid,stat,args"], capture_output=True, text=True, check=True).stdout
        mine = [line for line in sessions.splitlines() if line.split()[0] == str(self.process.pid)]
        assert [line for line in mine if not line.split()[1].startswith("Z")] == [], "processes are left"
        self.check_shared_memory()
        caches = {"torchinductor_root"}  # of compiled code, which torch keeps for the next process
        assert {path.name for path in self.temporary.iterdir()} <= caches, "temporary files are left"
        return self.process.returncode, output

    def check_shared_memory(self) -> None:
        """Fail if names are left in /dev/shm."""
        left = shared_memory_left(self.shared_memory)
        deadline = time.monotonic() + 20
        while left and time.monotonic() < deadline:  # another test's, which it has closed but not removed yet
            time.sleep(0.2)
            left &= shared_memory_left(self.shared_memory)
        assert not left, "shared memory is left"


@pytest.fixture
def job(tmp_path: Path, model_folder: Path) -> Job:
    return Job(tmp_path, model_folder)


def test_ctrl_c_saves_the_last_step_and_says_how_to_continue(job, in_processes):
    job.start("train", f"{job.folder}/recipe.py:job")
    job.wait_for_steps(2)
    job.ctrl_c()
    code, output = job.end()
    assert code == 4 and "Traceback" not in output, output
    assert output.count("SIGINT received; finishing the update, then saving") == 1
    assert f"Continue with: oreal train --resume {job.folder}/run" in output
    (checkpoint,) = (job.folder / "run/checkpoints").glob("step_*")
    assert checkpoint.suffix != ".partial" and (checkpoint / "manifest.json").is_file()
    step = int(checkpoint.name.removeprefix("step_"))
    assert step == (job.folder / "run/metrics.jsonl").read_text().count("\n")
    resume = ("train", "--resume", f"{job.folder}/run", "--set", f"steps={step + 1}")
    ((code, output),) = in_processes(1, run_command, *resume, timeout_s=600)
    assert code == 0, output
    job.check_shared_memory()
    rows = [json.loads(line) for line in (job.folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(step + 1))


def test_an_error_in_the_middle_leaves_nothing_behind(job):
    (job.folder / "sitecustomize.py").write_text(BROKEN)
    job.start("train", f"{job.folder}/recipe.py:job", processes=1)
    code, output = job.end()
    assert code not in (0, 2, 3, 4) and "ZeroDivisionError: planted in the second step" in output, output
    assert (job.folder / "run/metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("command", ["plan", "sft"])
def test_ctrl_c_before_there_is_anything_to_save_ends_in_one_line(job, command):
    job.start(command, f"{job.folder}/recipe.py:job")
    time.sleep(3.0)  # anywhere between the first import and the first result
    job.ctrl_c()
    code, output = job.end()
    # -SIGINT: it came after the last line, when Python had given up its handlers.
    assert code in (2, 4, 130, -signal.SIGINT) and "Traceback" not in output, output
