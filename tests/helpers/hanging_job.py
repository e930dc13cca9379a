"""A job with real processes and the phases of the loop, in which one rank goes wrong: `hanging_job.py '{"kind": ...}'`.

Fields: folder, kind, rank, step and phase of the fault; limits: of the watchdog; restarts: attempts with the fault.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from oreal_megatron import config as c
from oreal_megatron.mcore import parallel
from oreal_megatron.observe.recorder import Recorder
from oreal_megatron.runtime import heartbeat, watchdog
from oreal_megatron.verify.worker_pool import Pool

PHASES = (
    "generate",
    "verify",
    "parity",
    "reward_model",
    "reference",
    "policy",
    "weight_sync",
    "checkpoint",
    "evaluate",
)
SCRIPTED_WORKER = str(Path(__file__).with_name("scripted_worker.py"))


def sleep() -> None:
    time.sleep(100)


def wait_for_a_worker() -> None:
    pool = Pool(1, 1000.0, command=[sys.executable, SCRIPTED_WORKER])
    pool.submit("response", "a", "sleep 100").result()


def hold_the_lock() -> None:
    sum(range(10**12))


def fail() -> None:
    raise ValueError("a bug of one rank")


def slow_but_alive() -> None:
    for _ in range(10):
        time.sleep(0.3)
        heartbeat.beat()


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS = {
    "sleep": sleep, "worker": wait_for_a_worker, "lock": hold_the_lock, "fail": fail, "slow": slow_but_alive,
    "kill": kill_itself, "stop": stop_itself,
}  # fmt: skip


def work(job: SimpleNamespace, step: int | None, phase: str) -> None:
    for micro_batch in range(2):
        heartbeat.beat(micro_batch)
        everyone = job.rank == -1
        if (step, phase, micro_batch) == (job.step, job.phase, 1) and (everyone or dist.get_rank() == job.rank):
            time.sleep(0.6)  # its place has been told
            FAULTS[job.kind]()
        dist.all_reduce(torch.ones(2))


def main(job: SimpleNamespace) -> None:
    parallel.start_process_group()
    config = c.Config(run=f"{job.folder}/run", steps=2, watchdog=c.WatchdogConfig(**job.limits))
    try:
        watchdog.start(config)
        work(job, None, "start")
        run = Recorder(config)
        with run.steps() as steps:
            for step in steps:
                for phase in PHASES:
                    with run.phase(phase):
                        work(job, step, phase)
        with heartbeat.phase("stop"):
            dist.barrier()
            dist.destroy_process_group()
    except Exception as error:
        watchdog.failed(error)
        raise
    finally:
        watchdog.stop()


def rank_of_a_test(rank: int, world: int, port: int, job: dict) -> None:
    """As torchrun would start it, but in a process that has imported everything."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = os.open(f"{job['folder']}/stderr_{rank}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 2)
    main(SimpleNamespace(**job))


if __name__ == "__main__":
    job = SimpleNamespace(**json.loads(sys.argv[1]))
    if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) >= job.restarts:
        job.kind = "slow"
    main(job)
