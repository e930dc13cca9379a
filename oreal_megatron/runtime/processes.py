"""What processes of this machine are seen doing: their Python stacks, whether they wait in a collective, their end."""

from __future__ import annotations

import contextlib
import linecache
import os
import socket
import sys
from pathlib import Path
from types import FrameType

GONE = "ZX"  # states of a process that has ended


def machine() -> str:
    """Equal where process ids mean the same: containers of one machine may number their own."""
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"


def state(pid: int) -> str:
    """One letter, as ps shows it; X where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def waits() -> bool:
    """Whether a thread of this process stands in a collective. On a GPU some return at once, and show no wait."""
    return any(_collective(frame) for frame in sys._current_frames().values())


def _collective(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if file.endswith("torch/distributed/distributed_c10d.py") or "/vllm/distributed/" in file:
        return True
    return "megatron" in file and ".wait(" in linecache.getline(file, frame.f_lineno)


def stacks(pid: int, descriptor: int) -> str:
    """What faulthandler wrote to an open file of a process that cannot speak for itself."""
    now = state(pid)
    if now not in GONE:
        with contextlib.suppress(OSError):
            if text := Path(f"/proc/{pid}/fd/{descriptor}").read_text():
                return text
    return f"No stacks: its process {pid} is in state {now} (T: stopped, D: in the kernel, Z or X: ended).\n"
