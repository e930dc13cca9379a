"""One writer for a folder: a lock file with host and process of its holder, which dead holders do not keep.

Created with O_EXCL, which is atomic on NFS too; file locks (flock, fcntl) are not supported or not passed on by many
network file systems. The holder refreshes the file's modification time. A lock counts as left behind

- on the same machine: when its process has ended (its id and start time are in the file);
- from another machine: when nothing refreshes it for SILENT_S. Only changes are observed, no clocks are compared.

A process that replaces such a lock first creates a second file, the claim, in the same way. The lock's own name is
never free in between: a third process could create it then, and a slow second one would remove the new holder's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from oreal_megatron.config import ConfigError
from oreal_megatron.runtime import processes
from oreal_megatron.runtime.exit_codes import LOST

log = logging.getLogger(__name__)
NAME, CLAIM = "writer.lock", "writer.lock.claim"
REFRESH_S = 10.0
SILENT_S = 35.0  # without a refresh, until a holder on another machine counts as gone


class FolderLock:
    """Lock of a folder, held by this process between `acquire` and `release`. One rank of a job takes it."""

    def __init__(self, folder: Path, on_loss: Callable[[], None] = lambda: os._exit(LOST)):
        """Call `on_loss`, on a thread, when another process has taken the lock over, e.g. after a long suspension."""
        self.path, self.on_loss = folder / NAME, on_loss
        self.descriptor = -1
        self.released = threading.Event()

    def acquire(self) -> None:
        """Create the lock file; take over one that was left behind. Raises ConfigError that names a live holder."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                holder = _read(self.path)
                if _is_alive(self.path, holder):
                    raise ConfigError(_refusal(self.path))
                if self._take_over(holder):
                    break
        except OSError as error:
            raise ConfigError(f"the folder {self.path.parent} cannot be written: {error}") from None
        threading.Thread(target=self._refresh, name="folder lock", daemon=True).start()

    def release(self) -> None:
        """Delete the lock file."""
        self.released.set()
        if self.descriptor >= 0:
            if self._is_own():
                with contextlib.suppress(OSError):
                    self.path.unlink()
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _create(self) -> bool:
        """Create the lock file; return False if there is one."""
        try:
            self.descriptor = _create_identified(self.path)
        except FileExistsError:
            return False
        return True

    def _take_over(self, holder: dict[str, Any]) -> bool:
        """Replace the lock of a holder that is gone by an own one; return False if another process did."""
        claim = self.path.with_name(CLAIM)
        try:
            descriptor = _create_identified(claim)
        except FileExistsError:
            self._wait_for(claim)
            return False
        if _read(self.path) != holder:  # another process had replaced it before the claim
            os.close(descriptor)
            claim.unlink()
            return False
        os.rename(claim, self.path)  # the claim becomes the lock, and is free for others again
        self.descriptor = descriptor
        log.warning("%s: the writer before, process %s on %s, is gone; its lock is taken over",
                    self.path.parent, holder.get("pid"), holder.get("host"))  # fmt: skip
        return True

    def _wait_for(self, claim: Path) -> None:
        """Wait until another process has used its claim. Raises ConfigError if it ended in between."""
        deadline = time.monotonic() + SILENT_S
        while claim.exists():
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{self.path.parent}: a process that was taking the folder over has ended in between; if no other "
                    f"process uses the folder, delete {claim} and {self.path}"
                )
            time.sleep(0.02)

    def _refresh(self) -> None:
        while not self.released.wait(REFRESH_S):
            with contextlib.suppress(OSError):  # a network file system that does not answer now may answer later
                os.utime(self.descriptor)
            if not self._is_own() and not self.released.is_set():
                log.error("%s was taken by another process while this one was suspended; it ends", self.path)
                self.on_loss()
                return

    def _is_own(self) -> bool:
        """Return whether the file is the one that this process created; True while that cannot be read."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except FileNotFoundError:
            return False
        except OSError:
            return True


def _create_identified(path: Path) -> int:
    """Create a file with this process's identity; return its descriptor. Raises FileExistsError if it exists."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    with contextlib.suppress(OSError):  # on a full disk the lock stays empty; it is refreshed all the same
        os.write(descriptor, json.dumps(_own_identity()).encode())
        os.fsync(descriptor)
    return descriptor


def _refusal(path: Path) -> str:
    holder = _read(path)
    return (
        f"{path.parent} is being written by process {holder.get('pid')} on {holder.get('host')}, since "
        f"{holder.get('since')}; a folder has one writer. Wait until it ends, or choose another folder. If there is no "
        f"such process, delete {path}"
    )


def _own_identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "start": processes.start_time(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def _machine() -> str:
    """Return what tells apart machines, their boots, and containers with process ids of their own."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{processes.machine_id()} {boot.read_text().strip() if boot.is_file() else ''}"


def _read(path: Path) -> dict[str, Any]:
    """Return the holder of a lock file, {} while it is being written or if it is not one."""
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_alive(path: Path, holder: dict[str, Any]) -> bool:
    """Return whether the holder of a lock still runs; watches the file of one whose process cannot be seen."""
    if holder.get("machine") == _machine():
        pid = int(holder["pid"])
        return processes.state(pid) not in processes.ENDED and processes.start_time(pid) == holder["start"]
    modified, deadline = _modified(path), time.monotonic() + SILENT_S
    log.info("%s names process %s on %s; waiting up to %.0f s to see whether it is alive",
             path, holder.get("pid"), holder.get("host"), SILENT_S)  # fmt: skip
    while time.monotonic() < deadline:
        time.sleep(min(0.5, SILENT_S / 10))
        if (now := _modified(path)) != modified:
            return now is not None
    return False


def _modified(path: Path) -> int | None:
    """Return the modification time as the server of the file has it now: opening a file renews cached attributes."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
