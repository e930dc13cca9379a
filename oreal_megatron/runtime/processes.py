"""Processes of this machine: Python stacks, state, and whether they wait in a collective."""

from __future__ import annotations

import contextlib
import linecache
import os
import socket
import sys
from pathlib import Path
from types import FrameType

ENDED = "ZX"  # states of a process that has ended


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


def in_collective() -> bool:
    """Return whether a thread of this process is in a collective. Asynchronous ones on a GPU do not show."""
    return any(_is_collective(frame) for frame in sys._current_frames().values())


def _is_collective(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if file.endswith("torch/distributed/distributed_c10d.py") or "/vllm/distributed/" in file:
        return True
    return "megatron" in file and ".wait(" in linecache.getline(file, frame.f_lineno)


def read_stacks(pid: int, descriptor: int) -> str:
    """Return what faulthandler wrote to an open file of another process, or why there is nothing."""
    now = state(pid)
    if now not in ENDED:
        with contextlib.suppress(OSError):
            if text := Path(f"/proc/{pid}/fd/{descriptor}").read_text():
                return text
    return f"No stacks: process {pid} is in state {now} (T: stopped, D: in the kernel, Z or X: ended).\n"
