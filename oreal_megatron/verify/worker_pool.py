"""Pool of long-lived worker processes that can be killed. One thread of this process owns their pipes and clocks.

Limits are enforced from outside the workers: one that exceeds its time is killed, memory is limited by the kernel
(prlimit). The answer being graded becomes "unknown", a new worker starts, and all other answers keep their order.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from oreal_megatron.runtime.chat_client import API_KEY
from oreal_megatron.runtime.futures import cancel, fail, settle

IN_FLIGHT = 16  # answers written ahead to one worker; it grades them in turn, each with its own clock
START_S = 60.0  # a worker that is not ready by then counts as dead
MAX_FAILED_STARTS = 5  # in a row, before the pool gives up
_ROOT = str(Path(__file__).resolve().parents[2])
_TICK_S = 5.0


class PoolBroken(RuntimeError):
    """No worker can be started, or the pool is closed."""


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a worker; "unknown" with the method "time-out" or "error" where there is none."""

    outcome: str
    method: str
    extracted: str | None
    seconds: float
    reason: str = ""  # of an "unknown", where the worker tells it
    reward: float | None = None  # where the user's function returned a number


@dataclass(slots=True)
class _Task:
    line: bytes
    future: Future[Result]


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    stdout: IO[bytes]
    ready: bool = False
    deadline: float = 0.0  # of the answer being graded, in monotonic time; of the start while not ready
    started: float = 0.0  # when that answer began
    tasks: deque[_Task] = field(default_factory=deque)  # the first is being graded
    unread: bytes = b""
    unwritten: bytearray = field(default_factory=bytearray)


class Pool:
    """Worker processes that grade answers. `submit` may be called from any thread and never blocks."""

    def __init__(
        self,
        workers: int = 2,
        timeout_s: float = 2.0,
        memory_mib: int = 1024,
        command: list[str] | None = None,
        function: str = "",  # name of a user's function that grades
    ) -> None:
        if workers < 1 or timeout_s <= 0:
            raise ValueError(
                f"a pool needs at least one worker and a time limit above zero, got {workers} and {timeout_s}"
            )
        own = [sys.executable, "-m", "oreal_megatron.verify.worker_process", *([function] if function else [])]
        self._command = command or own
        self._size, self._timeout_s, self._memory = workers, timeout_s, memory_mib * 2**20
        self._waiting: deque[_Task] = deque()
        self._lock = threading.Lock()
        self._closing, self._failed_starts = False, 0
        self._broken: PoolBroken | None = None
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self.replaced = 0  # workers that died or were killed so far
        self._thread = threading.Thread(target=self._run, name="verify-pool", daemon=True)
        self._thread.start()

    # -- for every thread ----------------------------------------------------------------------------------------
    def submit(
        self, kind: str, gold: str, text: str, finished: bool = True, thinking_end: tuple[str, ...] = ()
    ) -> Future[Result]:
        """Return a future result; `kind` is "response", "text" or "itself" (see worker_process.grade).

        Workers of a user's function take the row in place of the gold answer, whatever the kind.

        It fails with PoolBroken when no worker can be started.
        """
        future: Future[Result] = Future()
        line = json.dumps([kind, gold, text, finished, thinking_end]).encode() + b"\n"
        with self._lock:
            if self._closing:
                raise self._broken or PoolBroken("the grading pool is closed; create a new one")
            self._waiting.append(_Task(line, future))
            self._wake()
        return future

    def close(self) -> None:
        """End the workers; pending results are cancelled."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._wake()
        self._thread.join()

    def pids(self) -> list[int]:
        """Return the process ids of the live workers."""
        return [worker.process.pid for worker in list(self._workers)]

    def _wake(self) -> None:
        """Wake the thread that owns the workers. Call with the lock held, so that the pipe is open."""
        try:
            os.write(self._wake_write, b"x")
        except BlockingIOError:
            pass  # the pipe is full of wake-ups already

    # -- the thread that owns the workers --------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while not self._closing:
                self._fill()
                for key, events in self._selector.select(self._seconds_to_deadline()):
                    if key.data is None:
                        os.read(self._wake_read, 65536)
                    elif key.data in self._workers:
                        self._serve(key.data, events)
                self._kill_late_workers()
        except PoolBroken as broken:
            self._broken = broken
        except Exception as error:  # without this thread no future would ever be done
            self._broken = PoolBroken(
                f"the thread of the grading pool failed with {error!r}; this is a bug, please report it"
            )
        finally:
            self._end()

    def _seconds_to_deadline(self) -> float:
        """Return the seconds until the next deadline, at most _TICK_S."""
        deadlines = [worker.deadline for worker in self._workers if worker.tasks or not worker.ready]
        return max(0.0, min([_TICK_S, *(deadline - time.monotonic() for deadline in deadlines)]))

    def _fill(self) -> None:
        """Start missing workers once there is work, and send waiting answers to the workers with the fewest."""
        while self._waiting and len(self._workers) < self._size:
            self._start()
        while self._waiting:
            able = [worker for worker in self._workers if worker.ready and len(worker.tasks) < IN_FLIGHT]
            if not able:
                return
            self._send_next(min(able, key=lambda worker: len(worker.tasks)))

    def _send_next(self, worker: _Worker) -> None:
        with self._lock:
            task = self._waiting.popleft()
        if task.future.cancelled():
            return
        worker.tasks.append(task)
        if len(worker.tasks) == 1:
            self._start_clock(worker)
        worker.unwritten += task.line
        self._write(worker)

    def _start_clock(self, worker: _Worker) -> None:
        worker.started = time.monotonic()
        worker.deadline = worker.started + self._timeout_s

    def _start(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([_ROOT, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }
        environment.pop(API_KEY, None)  # a worker reads what models write
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            start_new_session=True,  # Ctrl-C at the terminal reaches the trainer only, which then closes the pool
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            resource.prlimit(process.pid, resource.RLIMIT_AS, (self._memory, self._memory))
            resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
        except ProcessLookupError:
            pass  # it has died: reading finds the end of its output
        for pipe in (process.stdin, process.stdout):
            os.set_blocking(pipe.fileno(), False)
        worker = _Worker(process, process.stdin, process.stdout, deadline=time.monotonic() + START_S)
        self._workers.append(worker)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)

    def _serve(self, worker: _Worker, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._write(worker)
        if events & selectors.EVENT_READ and worker in self._workers:
            self._read(worker)

    def _write(self, worker: _Worker) -> None:
        """Write as much as the pipe takes now; the selector reports when it takes more."""
        try:
            while worker.unwritten:
                sent = os.write(worker.stdin.fileno(), worker.unwritten[:65536])
                del worker.unwritten[:sent]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            worker.unwritten.clear()  # it has died: reading finds the end of its output
        self._watch_writes(worker)

    def _watch_writes(self, worker: _Worker) -> None:
        pipe = worker.stdin
        watched = pipe.fileno() in self._selector.get_map()
        if worker.unwritten and not watched:
            self._selector.register(pipe, selectors.EVENT_WRITE, worker)
        elif not worker.unwritten and watched:
            self._selector.unregister(pipe)

    def _read(self, worker: _Worker) -> None:
        try:
            chunk = os.read(worker.stdout.fileno(), 65536)
        except BlockingIOError:
            return
        if not chunk:
            self._replace(worker, "error")
            return
        *lines, worker.unread = (worker.unread + chunk).split(b"\n")
        for line in lines:
            self._result(worker, line)

    def _result(self, worker: _Worker, line: bytes) -> None:
        if not worker.ready:
            worker.ready, self._failed_starts = True, 0
            return
        task = worker.tasks.popleft()
        if worker.tasks:
            self._start_clock(worker)
        settle(task.future, Result(*json.loads(line)))

    def _kill_late_workers(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if (worker.tasks or not worker.ready) and now >= worker.deadline:
                self._replace(worker, "time-out")

    def _replace(self, worker: _Worker, method: str) -> None:
        """End a worker: the answer it was grading is "unknown", those behind it return to the front, in order."""
        self._end_worker(worker)
        self.replaced += 1
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise PoolBroken(
                    f"{MAX_FAILED_STARTS} grading processes in a row died before they were ready; run "
                    f"`{' '.join(self._command)} < /dev/null` to see why, and check verify.memory_mib"
                )
        if worker.tasks:
            task = worker.tasks.popleft()
            settle(task.future, Result("unknown", method, None, time.monotonic() - worker.started))
        with self._lock:
            self._waiting.extendleft(reversed(worker.tasks))

    def _end_worker(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        for pipe in (worker.stdout, worker.stdin):
            if pipe.fileno() in self._selector.get_map():
                self._selector.unregister(pipe)
        worker.process.kill()
        worker.process.wait()
        worker.stdin.close()
        worker.stdout.close()

    def _end(self) -> None:
        """End every worker and settle every future."""
        with self._lock:
            self._closing = True
            os.close(self._wake_read)
            os.close(self._wake_write)
        unfinished = [task for worker in self._workers for task in worker.tasks] + list(self._waiting)
        for worker in list(self._workers):
            self._end_worker(worker)
        self._selector.close()
        for task in unfinished:
            if self._broken is None:
                cancel(task.future)
            else:
                fail(task.future, self._broken)
