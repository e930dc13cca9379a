"""Hangs and lost ranks of real processes: who is named, what is written, that the job ends with code 5 in time.

`python -m pytest --full tests/faults/test_watchdog.py` tries all of them, in every phase.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import hanging_job
import pytest
from gloo_processes import fork_context

PHASES = ("start", "generate", "verify", "parity", "reward_model", "reference", "policy", "weight_sync", "checkpoint",
          "evaluate")  # fmt: skip
LIMITS = {f"{phase}_s": 1.5 for phase in ("start", "generate", "verify", "reward_model", "reference", "policy",
                                          "checkpoint", "other")} | {"every_s": 0.2, "silent_s": 30.0}  # fmt: skip
PATIENT = {"every_s": 0.2, "silent_s": 30.0}


@dataclass
class Outcome:
    codes: list[int | None]
    seconds: float
    folder: Path

    def stderr(self, rank: int) -> str:
        return (self.folder / f"stderr_{rank}.txt").read_text()

    def sentences(self) -> list[str]:
        lines = "".join(self.stderr(rank) for rank in range(len(self.codes))).splitlines()
        return [line for line in lines if line.startswith("oreal: ")]

    def written(self, name: str) -> str:
        (file,) = self.folder.glob(f"run/hang/*/{name}.txt")
        return file.read_text()


@pytest.fixture(scope="module")
def start():
    """Processes that are forked from one that has imported torch and Megatron: seconds less for each."""
    context = fork_context()
    first = context.Process(target=int)  # the server's imports are nobody's 60 seconds
    first.start()
    first.join()

    def start(folder: Path, kind: str, phase: str, limits=LIMITS, rank=1, world=2) -> Outcome:
        job = {"folder": str(folder), "kind": kind, "phase": phase, "rank": rank, "limits": limits,
               "step": None if phase == "start" else 1}  # fmt: skip
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        begin = time.monotonic()
        children = [
            context.Process(target=hanging_job.rank_of_a_test, args=(one, world, port, job)) for one in range(world)
        ]
        for child in children:
            child.start()
        for number, child in enumerate(children):
            child.join(0 if kind in ("stop", "lock") and number == rank else 60)
            child.kill()
            child.join()
        return Outcome([child.exitcode for child in children], time.monotonic() - begin, folder)

    yield start


def every_phase_or(*phases: str):
    rows = [phase if phase in phases else pytest.param(phase, marks=pytest.mark.full) for phase in PHASES]
    return pytest.mark.parametrize("phase", rows)


def place(phase: str) -> str:
    return "phase start, micro-batch 1" if phase == "start" else f"phase {phase} of step 1, micro-batch 1"


@every_phase_or("policy")
def test_a_rank_that_sleeps_is_named_and_all_stacks_are_written(start, tmp_path, phase):
    ended = start(tmp_path, "sleep", phase)
    assert ended.codes == [5, 5]
    (sentence,) = ended.sentences()
    assert f"rank 1 is hung in {place(phase)}: no progress for " in sentence and "1.5 s allowed" in sentence
    assert "hanging_job.py" in ended.written("rank_1") and "in sleep\n" in ended.written("rank_1")
    assert "distributed_c10d.py" in ended.written("rank_0") and "in sleep\n" not in ended.written("rank_0")
    assert f"rank 0: {place(phase)}" in ended.written("diagnosis") and "waits in a collective" in ended.written(
        "diagnosis"
    )


@every_phase_or("verify")
def test_a_rank_that_waits_for_a_worker_is_named(start, tmp_path, phase):
    ended = start(tmp_path, "worker", phase)
    assert ended.codes == [5, 5]
    (sentence,) = ended.sentences()
    assert f"rank 1 is hung in {place(phase)}" in sentence
    assert "in wait_for_a_worker\n" in ended.written("rank_1")


@every_phase_or("generate")
def test_a_killed_rank_is_named_within_seconds(start, tmp_path, phase):
    ended = start(tmp_path, "kill", phase, PATIENT)
    assert ended.codes == [5, -9] and ended.seconds < 15
    (sentence,) = ended.sentences()
    assert f"rank 1 is lost, last seen in {place(phase)}" in sentence and "ended without an error message" in sentence
    assert "No stacks" in ended.written("rank_1")
    assert "Thread" in ended.written("rank_0")


@every_phase_or("weight_sync")
def test_a_killed_first_rank_takes_the_store_with_it_and_is_named(start, tmp_path, phase):
    ended = start(tmp_path, "kill", phase, PATIENT, rank=0)
    assert ended.codes == [-9, 5] and ended.seconds < 15
    assert f"rank 0 is lost, last seen in {place(phase)}" in ended.stderr(1)


@every_phase_or("reference")
def test_a_stopped_rank_is_silent(start, tmp_path, phase):
    ended = start(tmp_path, "stop", phase, PATIENT | {"silent_s": 3.0})
    assert ended.codes == [5, -9]
    (sentence,) = ended.sentences()
    assert f"rank 1 is lost, last seen in {place(phase)}: no report from process" in sentence
    assert "state T" in ended.written("rank_1")


@every_phase_or("checkpoint")
def test_a_rank_that_holds_pythons_lock_is_silent_and_its_stacks_are_written(start, tmp_path, phase):
    ended = start(tmp_path, "lock", phase, PATIENT | {"silent_s": 4.0})
    assert ended.codes[0] == 5
    (sentence,) = ended.sentences()
    assert f"rank 1 is lost, last seen in {place(phase)}: no report from process" in sentence
    assert "in hold_the_lock\n" in ended.written("rank_1")


@every_phase_or("parity")
def test_an_error_of_one_rank_is_told_by_the_others(start, tmp_path, phase):
    ended = start(tmp_path, "fail", phase, PATIENT, world=3)
    assert ended.codes == [5, 5, 5] and ended.seconds < 20
    (sentence,) = ended.sentences()
    assert f"rank 1 is lost, last seen in {place(phase)}: it ended with ValueError: a bug of one rank" in sentence
    assert "in fail\n" in ended.stderr(1), "the traceback"


def test_an_error_of_all_ranks_stays_what_it_is(start, tmp_path):
    ended = start(tmp_path, "fail", "policy", PATIENT, rank=-1)
    assert ended.codes == [1, 1] and not ended.sentences() and "a bug of one rank" in ended.stderr(0)


def test_no_alarm_while_a_slow_rank_goes_on_and_the_other_waits(start, tmp_path):
    ended = start(tmp_path, "slow", "policy")  # 3 s of beats; the other rank has none for 3 s of 1.5 allowed
    assert ended.codes == [0, 0] and not ended.sentences() and not (tmp_path / "run/hang").exists()
    assert ended.seconds > 3


def test_one_process_watches_itself(start, tmp_path):
    ended = start(tmp_path, "sleep", "policy", rank=0, world=1)
    assert ended.codes == [5] and "rank 0 is hung in phase policy of step 1" in ended.stderr(0)


def time_outs() -> list[float]:
    """Seconds that torch's and Megatron's groups wait."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from oreal_megatron.config import ParallelConfig
    from oreal_megatron.mcore import parallel

    parallel.start_process_group(240.0)
    parallel.start_megatron(ParallelConfig(), 0, 240.0)
    made = (
        dist.group.WORLD,
        parallel_state.get_data_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in made]


def test_process_groups_wait_no_longer_than_the_outer_bound(in_processes):
    assert in_processes(1, time_outs) == [[240.0, 240.0, 240.0]]


@pytest.mark.full
def test_torchrun_restarts_after_a_hang(tmp_path):
    job = {"folder": str(tmp_path), "kind": "sleep", "phase": "policy", "rank": 1, "limits": LIMITS, "step": 1,
           "restarts": 1}  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*torchrun, "--max-restarts", "1", hanging_job.__file__, json.dumps(job)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("oreal: rank 1 is hung in phase policy of step 1") == 1
