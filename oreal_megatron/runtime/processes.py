"""Processes of this machine: Python stacks, state, and whether they wait for other ranks."""

from __future__ import annotations

import contextlib
import itertools
import linecache
import os
import re
import socket
import sys
import threading
from pathlib import Path
from types import FrameType

ENDED = "ZX"  # states of a process that has ended
# A call on which the host waits for its GPU: it ends in a method, is a conversion, or torch's own call. Python's
# positions of a method that stands on a line of its own begin at its name.
WAITING_CALL = re.compile(
    r"((^|\.)(item|cpu|tolist|numpy|nonzero)|synchronize)\(\)$|^(float|int|bool)\(|"
    r"(^|\.)to\(['\"]cpu['\"]\)$|_accelerator_synchronizeDevice\("
)
GPU_PACKAGES = ("/oreal_megatron/mcore/", "/oreal_megatron/reshard/", "/megatron/core/", "/vllm/v1/worker/")


def machine_id() -> str:
    """Return host name and namespace of process ids: containers of one machine may number their own."""
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"


def state(pid: int) -> str:
    """Return the state of a process as ps shows it; X if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def start_time(pid: int) -> str:
    """Return the time since boot at which a process started, in clock ticks; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def in_collective(on_gpu: bool) -> bool:
    """Return whether a thread of this process is in a collective, as far as Python stacks show.

    On a GPU collectives return at once, and the host waits for them where it next reads a tensor: then the main thread
    counts as in a collective while it reads one, or synchronises, on behalf of the trainer, the weight sync or the
    engine, whose ranks wait for the outputs of a step.
    """
    frames = sys._current_frames()
    if any(_is_collective(frame) for frame in frames.values()):
        return True
    main = frames.get(threading.main_thread().ident or 0)
    return on_gpu and main is not None and _waits_for_gpu(main)


def _is_collective(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if file.endswith("torch/distributed/distributed_c10d.py") or "/vllm/distributed/" in file:
        return True
    line = frame.f_lineno or 0  # None while a frame is at an instruction that belongs to no line
    return "megatron" in file and ".wait(" in linecache.getline(file, line)


def _waits_for_gpu(innermost: FrameType) -> bool:
    """Return whether a thread is in a call that waits for the GPU, below a function of GPU_PACKAGES."""
    if not WAITING_CALL.search(_running_call(innermost)):
        return False
    frame: FrameType | None = innermost
    while frame is not None:
        if any(package in frame.f_code.co_filename for package in GPU_PACKAGES):
            return True
        frame = frame.f_back
    return False


def _running_call(frame: FrameType) -> str:
    """Return the source text of the expression that a frame is evaluating; empty where it is not known."""
    positions = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), (None,) * 4)
    first, last, start, stop = positions
    if first is None or last is None:
        return ""
    lines = [linecache.getline(frame.f_code.co_filename, number).encode() for number in range(first, last + 1)]
    lines[-1] = lines[-1][:stop]  # columns count bytes
    lines[0] = lines[0][start:]
    return b"".join(lines).decode(errors="replace")


def read_stacks(pid: int, descriptor: int) -> str:
    """Return what faulthandler wrote to an open file of another process, or why there is nothing."""
    now = state(pid)
    if now not in ENDED:
        with contextlib.suppress(OSError):
            if text := Path(f"/proc/{pid}/fd/{descriptor}").read_text():
                return text
    return f"No stacks: process {pid} is in state {now} (T: stopped, D: in the kernel, Z or X: ended).\n"
