"""Ends a job that hangs or has lost a rank: names who and where, writes all Python stacks, exits with exit_codes.LOST.

Every rank has two threads. One tells the others through a TCP store where its rank is, reads where they are, and
judges (hang.py). The other sees to it that the first gets round: a store on a dead host does not answer. A rank whose
threads cannot run (killed, stopped, stuck in native code that holds Python's lock) is silent, which the others notice.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from oreal_megatron import config
from oreal_megatron.runtime import distributed, hang_diagnosis, heartbeat, processes
from oreal_megatron.runtime.exit_codes import LOST

WRITE_S = 10.0  # for the stacks: the file system may be what hangs
TOGETHER_S = 5.0  # for the other ranks to write theirs, before an exit makes torchrun end them
STUCK_SHARE = 0.8  # of silent_s after which a stuck interpreter's stacks are written, while the others still wait


class Watchdog:
    def __init__(self, config: config.Config):
        self.limits, self.folder = config.watchdog, Path(config.run) / "hang"
        self.rank, self.world, self.machine = distributed.rank(), distributed.world_size(), processes.machine()
        self.state, self.error, self.told = hang_diagnosis.RUNNING, "", 0
        self.stacks = os.fdopen(os.memfd_create("stacks"), "w")  # others on this machine read it through /proc
        self.store = _store(self.limits.silent_s)
        self.keys = [f"rank {rank}" for rank in range(self.world)]
        self.raw: list[bytes] = [b""] * self.world
        self.reports: list[hang_diagnosis.Report] = []
        self.heard_at = [time.monotonic()] * self.world
        self.round_at = time.monotonic()
        self.stopping, self.one_end = threading.Event(), threading.Lock()
        heartbeat.beat()  # until here nobody counted
        self.store.set("verdict", "")
        self._tell()
        distributed.all_gather_object(None)  # now every key is there
        self._hear()
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self._watch, self._guard)]
        for thread in self.threads:
            thread.start()

    # -- for the main thread -------------------------------------------------------------------------------------
    def stop(self) -> None:
        """This rank has come to its end, and may leave."""
        self.state = hang_diagnosis.DONE
        self.stopping.set()
        for thread in self.threads:
            thread.join(WRITE_S)
        faulthandler.cancel_dump_traceback_later()

    def failed(self, error: BaseException) -> None:
        """Tell of an error that nobody expected. Returns when all ranks have one.

        Else the process ends here: where a rank was lost, this error is only what its collectives made of it;
        otherwise this rank is itself lost to the others.
        """
        if self.world == 1:
            return
        self.error = f"{type(error).__name__}: {error}".splitlines()[0]
        self.state = hang_diagnosis.FAILING
        here = all(one.host == self.machine for one in self.reports)
        deadline = time.monotonic() + 3 * self.limits.every_s + (0.0 if here else self.limits.silent_s)
        while self._others_run() and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._others_run():
            traceback.print_exception(error)
            self.state = hang_diagnosis.FAILED  # upon which the other thread ends the job
            self.threads[0].join(self.limits.silent_s)
        self.stopping.set()
        time.sleep(2 * self.limits.every_s)  # until the others have seen it too: the store may go with this process

    def _others_run(self) -> bool:
        return any(one.state == hang_diagnosis.RUNNING for one in self.reports if one.rank != self.rank)

    # -- the thread that talks and judges ------------------------------------------------------------------------
    def _watch(self) -> None:
        try:
            while not self.stopping.wait(self.limits.every_s):
                self._forgive_a_pause()
                self._tell()
                agreed = self._hear() or self._propose(hang_diagnosis.judge(self.reports, self.limits.silent_s))
                if agreed:
                    self._end(hang_diagnosis.verdict(agreed))
            self._tell()
        except Exception as error:  # the store is gone with its host, or with a first rank that has left
            self._end_without_store(f"{type(error).__name__}: {error}".splitlines()[0])

    def _forgive_a_pause(self) -> None:
        """A job that was suspended as a whole (Slurm does that) has not been idle."""
        now = time.monotonic()
        if now - self.round_at > self.limits.silent_s / 2:
            heartbeat.progress.beat_at = now
            self.heard_at = [now] * self.world

    def _tell(self) -> None:
        here, self.told = heartbeat.progress, self.told + 1
        limit = getattr(self.limits, f"{here.phase}_s", self.limits.other_s)
        report = hang_diagnosis.Report(
            self.rank, self.machine, os.getpid(), self.stacks.fileno(), here.step, here.phase, here.micro_batch,
            here.borders, time.monotonic() - here.beat_at, limit, processes.waits(), self.state, self.error,
        )  # fmt: skip
        self.store.set(self.keys[self.rank], b"%d " % self.told + hang_diagnosis.encode(report))

    def _hear(self) -> bytes:
        """Read where all ranks are; the verdict that one has come to, if so."""
        *told, verdict = self.store.multi_get([*self.keys, "verdict"])
        now = self.round_at = time.monotonic()
        self.heard_at = [now if new != old else at for new, old, at in zip(told, self.raw, self.heard_at, strict=True)]
        self.raw = told
        reports = [hang_diagnosis.report(raw.split(b" ", 1)[1]) for raw in told]
        self.reports = [one.found(self._gone(one), now - self.heard_at[one.rank]) for one in reports]
        return verdict

    def _propose(self, mine: hang_diagnosis.Diagnosis | None) -> bytes:
        """The verdict of the rank that came to one first."""
        return (
            self.store.compare_set("verdict", "", hang_diagnosis.encode(mine.said_by(self.rank)).decode())
            if mine
            else b""
        )

    def _gone(self, one: hang_diagnosis.Report) -> bool:
        return one.host == self.machine and processes.state(one.pid) in processes.GONE

    # -- the thread that needs nobody ----------------------------------------------------------------------------
    def _guard(self) -> None:
        """End the job when the store does not answer; have stacks written when no Python thread can run here."""
        last, alone = time.monotonic(), self.world == 1
        while not self.stopping.wait(self.limits.every_s):
            to = sys.__stderr__ if alone else self.stacks
            faulthandler.dump_traceback_later(STUCK_SHARE * self.limits.silent_s, file=to, exit=alone)
            now = time.monotonic()
            if now - last > self.limits.silent_s / 2:  # this thread was paused, and so was the other
                self.round_at = now
            if now - self.round_at > self.limits.silent_s:
                self._end_without_store(f"no reply for {now - self.round_at:.0f} s")
            last = now

    def _end_without_store(self, why: str) -> None:
        """Nothing to be said while the ranks leave: the store goes with the first."""
        if self.stopping.is_set() or heartbeat.progress.phase == "stop":
            return
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        sentence = f"the store beside the first rank ({address}) is lost ({why}): its process, its host or the network"
        others = [one.found(self._gone(one), 0.0) for one in self.reports if one.gone or self._gone(one)]
        found = hang_diagnosis.judge(others, self.limits.silent_s) or hang_diagnosis.Diagnosis(
            (0,), sentence, heartbeat.progress.step
        )
        self._end(found.said_by(self.rank))

    # -- the end -------------------------------------------------------------------------------------------------
    def _end(self, found: hang_diagnosis.Diagnosis) -> None:
        """Stacks to the run folder, the sentence to stderr, and out; never waits for what may hang."""
        self.one_end.acquire()  # kept: the process ends here
        where = self.folder / ("start" if found.step is None else f"step_{found.step}")
        _in_time(lambda: self._write(where, found), WRITE_S)
        self._kill_the_mute()
        if found.by == self.rank:
            line = f"oreal: {found.sentence}. Stacks of all ranks: {where}; exit code {LOST}"
            print(line, file=sys.stderr, flush=True)
        _in_time(self._wait_for_writers, TOGETHER_S)
        os._exit(LOST)

    def _write(self, where: Path, found: hang_diagnosis.Diagnosis) -> None:
        where.mkdir(parents=True, exist_ok=True)
        said = "".join(f"{line}\n" for line in (found.sentence, *(one.line() for one in self.reports)))
        if found.by == self.rank:
            (where / "verdict.txt").write_text(said)
        with open(where / f"rank_{self.rank}.txt", "w") as file:
            print(said, file=file, flush=True)
            faulthandler.dump_traceback(file)
        here = [one for one in self.reports if one.host == self.machine]
        if [one.rank for one in here if not self._mute(one)][:1] == [self.rank]:
            for one in filter(self._mute, here):
                text = processes.stacks(one.pid, one.stacks)
                (where / f"rank_{one.rank}.txt").write_text(f"{said}\n{text}")

    def _kill_the_mute(self) -> None:
        """A stopped or stuck process answers no other signal, and torchrun would wait for it."""
        for one in self.reports:
            if one.host == self.machine and one.state != hang_diagnosis.DONE and self._mute(one):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGKILL)

    def _mute(self, one: hang_diagnosis.Report) -> bool:
        return one.gone or one.state == hang_diagnosis.DONE or one.silent_s > STUCK_SHARE * self.limits.silent_s

    def _wait_for_writers(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store has left with the first rank
            self.store.add("written", 1)
            while self.store.add("written", 0) < sum(not self._mute(one) for one in self.reports):
                time.sleep(0.05)


_watchdog: Watchdog | None = None  # one a process, as faulthandler's timer is


def start(config: config.Config) -> None:
    """Watch over this rank and the others until `stop`. Collective; after the process group was made."""
    global _watchdog
    if config.watchdog.every_s:
        _watchdog = Watchdog(config)


def stop() -> None:
    """Leave without alarm."""
    global _watchdog
    if _watchdog:
        _watchdog.stop()
    _watchdog = None


def failed(error: BaseException) -> None:
    """Call it with an error that nobody expected, before the process ends with it; see Watchdog.failed."""
    if _watchdog:
        _watchdog.failed(error)


def _store(timeout_s: float) -> Any:
    if distributed.world_size() == 1:
        return dist.HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    tcp = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    return dist.PrefixStore(
        distributed.all_gather_object(uuid.uuid4().hex)[0], tcp
    )  # a restart finds its predecessor's keys there


def _in_time(function: Callable[[], Any], seconds: float) -> None:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
