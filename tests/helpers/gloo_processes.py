"""Run a function on every rank of a small gloo world, in spawned processes."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch


def run_in_processes(world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Run a module-level function in `world` gloo processes and return each rank's result."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results: Any = context.Queue()
    workers = [
        context.Process(target=_run_rank, args=(rank, world, port, results, function, args)) for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    try:
        gathered = dict(results.get(timeout=timeout_s) for _ in workers)
    finally:
        for worker in workers:
            worker.join(timeout=20)
            worker.kill()
    failures = [f"rank {rank}:\n{error}" for rank, (_, error) in sorted(gathered.items()) if error]
    assert not failures, "\n".join(failures)
    return [torch.load(io.BytesIO(gathered[rank][0]), weights_only=False) for rank in range(world)]


def _run_rank(rank: int, world: int, port: int, results: Any, function: Callable[..., Any], args: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    try:
        packed = io.BytesIO()  # bytes, because tensors in a queue are file descriptors of a process that is gone
        torch.save(function(*args), packed)
        results.put((rank, (packed.getvalue(), "")))
    except BaseException:
        results.put((rank, (None, traceback.format_exc())))
        sys.exit(1)
