"""Run a function on every rank of a small gloo world.

The processes are forked from a server that has imported torch, transformers and Megatron, which takes 10 CPU seconds,
and for the tiers that generate vLLM, which takes as long again.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

PRELOADED = [
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "oreal_megatron.mcore.trained_models",
    "oreal_megatron.observe.recorder",
]
ENGINE = "oreal_megatron.rollout.engine"


def preload_engine() -> None:
    """Let the server import vLLM too, if it has not started yet."""
    if ENGINE not in PRELOADED:
        PRELOADED.append(ENGINE)


def fork_context() -> multiprocessing.context.ForkServerContext:
    """Return the context whose processes have everything of PRELOADED imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_in_processes(world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Run a module-level function in `world` gloo processes and return each rank's result."""
    context = fork_context()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results: Any = context.Queue()
    job = pickle.dumps((function, args))  # bytes, because tensors would go as file descriptors, 256 at most
    workers = [
        context.Process(target=_run_rank, args=(rank, world, port, dict(os.environ), results, job))
        for rank in range(world)
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


def run_command(*words: str) -> tuple[int, str]:
    """Run a command of `oreal` in this process; return its exit code and what it printed."""
    from oreal_megatron.cli.main import main

    with tempfile.TemporaryFile("w+") as printed:  # a real file, because vLLM asks for its descriptor
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = main(list(words))
        printed.seek(0)
        return code, printed.read()


def _run_rank(
    rank: int,
    world: int,
    port: int,
    environment: dict[str, str],
    results: Any,
    job: bytes,
) -> None:
    os.environ |= environment | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    for category in (DeprecationWarning, UserWarning, FutureWarning):  # as pyproject.toml has it for pytest
        warnings.simplefilter("ignore", category)
    try:
        function, args = pickle.loads(job)
        packed = io.BytesIO()  # bytes, because tensors in a queue are file descriptors of a process that is gone
        torch.save(function(*args), packed)
        results.put((rank, (packed.getvalue(), "")))
    except BaseException:
        results.put((rank, (None, traceback.format_exc())))
        sys.exit(1)
