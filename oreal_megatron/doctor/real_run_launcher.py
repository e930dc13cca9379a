"""Launcher of the real runs (real_runs.py) in processes of their own: on all GPUs, or two processes on CPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from oreal_megatron.doctor import real_runs
from oreal_megatron.doctor.checks import FAILED, OK, CheckResult

TIMEOUT_S = 600  # on GPUs the engine compiles and captures graphs
TERMINATION_S = 60  # torchrun gives its processes half of it
FIXES = {
    "collective": "ranks cannot reach each other: see NCCL_DEBUG=INFO; set the network with NCCL_SOCKET_IFNAME",
    "generate": "does vLLM work alone? `vllm serve` with any small model tells more",
    "train": "Megatron-core or the kernels failed; the last lines of the message name the call",
    "weight sync": "weights do not reach the engine; --set engine.transport=gather uses vLLM's own loader",
    "second step": "the engine does not use its new weights, or did not wake; --set engine.enforce_eager=true runs it "
    "without CUDA graphs, --set engine.sleep=false with a small engine.kv_cache_gib without sleep",
}


RANK = re.compile(r"^\[rank\d+\]: ")  # before each line of a traceback, where torch has a process group


def launch_real_runs(processes: int = 0) -> Iterator[CheckResult]:
    """Run all parts in so many processes; a part that reports nothing has failed, and ends the runs."""
    gpus = torch.cuda.device_count()
    processes = processes or gpus or 2
    if gpus and processes > gpus:
        yield CheckResult("run: collective", FAILED, f"{processes} GPUs, of which there are {gpus}", "lower --gpus")
        return
    duration = "some minutes" if gpus else "half a minute"
    print(f"real runs in {processes} processes, {duration} ...", file=sys.stderr, flush=True)
    # Without the variables of a scheduler: with PET_NNODES=4 torchrun would wait for three more nodes.
    scheduler = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {
        key: value for key, value in os.environ.items() if key not in scheduler and not key.startswith("PET_")
    }
    with tempfile.TemporaryDirectory() as folder:
        real_runs.make_model(Path(folder))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        output, errors = run_with_timeout([*torchrun, "-m", real_runs.__name__, folder], environment)
    prefix = real_runs.PREFIX
    lines = [line.removeprefix(prefix) for line in output.splitlines() if line.startswith(prefix)]
    succeeded = dict(line.split(": ", 1) for line in lines)
    for name in real_runs.PARTS:
        if name not in succeeded:
            yield CheckResult(f"run: {name}", FAILED, first_error(errors), FIXES[name])
            return
        yield CheckResult(f"run: {name}", OK, succeeded[name])


def run_with_timeout(command: list[str], environment: dict[str, str]) -> tuple[str, str]:
    """Return output and errors of a command. A command that hangs is ended, and the errors say so."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        return process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as timeout:
        output, errors = (_decode(text) for text in (timeout.stdout, timeout.stderr))
    process.terminate()  # torchrun ends its processes then; killed, it would leave them on the GPUs
    try:
        process.communicate(timeout=TERMINATION_S)
    except subprocess.TimeoutExpired:
        process.kill()
    return output, f"not finished after {TIMEOUT_S} s; its last lines: " + " | ".join(errors.strip().splitlines()[-3:])


def _decode(text: bytes | str | None) -> str:
    return text.decode(errors="replace") if isinstance(text, bytes) else text or ""


def first_error(errors: str) -> str:
    """Return the first error among the output of all ranks: it caused the others."""
    lines = [RANK.sub("", line).strip() for line in errors.splitlines() if line.strip()]
    causes = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Differ", "Stopped"))]
    return next(iter(causes), lines[-1] if lines else "ended without an error message")
