"""Watchdog: end a job that hangs or has lost a rank, name the rank, write all Python stacks, exit with LOST.

Every rank has two threads. The first exchanges progress reports with the other ranks through a TCP store and diagnoses
them (hang_diagnosis.py). The second watches the first, because a store on a dead host does not answer. A rank whose
threads cannot run (killed, stopped, blocked in native code that holds Python's lock) is silent; the others notice.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
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

import torch
import torch.distributed as dist

from oreal_megatron import config
from oreal_megatron.runtime import distributed, hang_diagnosis, heartbeat, processes
from oreal_megatron.runtime.exit_codes import LOST
from oreal_megatron.runtime.hang_diagnosis import Diagnosis, ProgressReport, diagnose

log = logging.getLogger(__name__)

WRITE_S = 10.0  # to write the stacks: the file system may be what hangs
PEERS_WRITE_S = 5.0  # for the other ranks to write theirs: torchrun ends them after the first exit
STACKS_SHARE = 0.8  # of silent_s, after which a blocked interpreter writes its stacks; the others still wait then


class Watchdog:
    """Watchdog of one rank."""

    def __init__(self, config: config.Config):
        self.limits, self.folder = config.watchdog, Path(config.run) / "hang"
        self.rank, self.world, self.machine = distributed.rank(), distributed.world_size(), processes.machine_id()
        self.state, self.error, self.sent = hang_diagnosis.RUNNING, "", 0
        self.stacks = os.fdopen(os.memfd_create("stacks"), "w")  # others on this machine read it through /proc
        self.store = _store(self.limits.silent_s)
        self.keys = [f"rank {rank}" for rank in range(self.world)]
        self.raw: list[bytes] = [b""] * self.world
        self.reports: list[ProgressReport] = []
        self.heard_at = [time.monotonic()] * self.world
        self.round_at = time.monotonic()
        self.stopping, self.ending = threading.Event(), threading.Lock()
        heartbeat.beat()  # time before the watchdog does not count
        self.store.set("diagnosis", "")
        self._send()
        distributed.all_gather_object(None)  # now every key exists
        self._receive()
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self._watch, self._guard)]
        for thread in self.threads:
            thread.start()

    # -- main thread -----------------------------------------------------------------------------------------------
    def stop(self) -> None:
        """Mark this rank as finished, so that it may exit."""
        self.state = hang_diagnosis.DONE
        self.stopping.set()
        for thread in self.threads:
            thread.join(WRITE_S)
        faulthandler.cancel_dump_traceback_later()

    def failed(self, error: BaseException) -> None:
        """Report an unexpected error. Return if all ranks have one.

        Otherwise the process ends here: if another rank was lost, this error is only its effect on a collective; if
        not, this rank is itself lost to the others.
        """
        if self.world == 1:
            return
        self.error = f"{type(error).__name__}: {error}".splitlines()[0]
        self.state = hang_diagnosis.FAILING
        one_machine = all(report.host == self.machine for report in self.reports)
        deadline = time.monotonic() + 3 * self.limits.every_s + (0.0 if one_machine else self.limits.silent_s)
        while self._others_running() and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._others_running():
            traceback.print_exception(error)
            self.state = hang_diagnosis.FAILED  # the other thread ends the job then
            self.threads[0].join(self.limits.silent_s)
        self.stopping.set()
        time.sleep(2 * self.limits.every_s)  # the others must see it too: the store may end with this process

    def _others_running(self) -> bool:
        return any(report.state == hang_diagnosis.RUNNING for report in self.reports if report.rank != self.rank)

    # -- first thread: reports and diagnosis -----------------------------------------------------------------------
    def _watch(self) -> None:
        try:
            while not self.stopping.wait(self.limits.every_s):
                self._exchange_or_log()
            self._send()
        except RuntimeError as error:  # of the store (torch's DistError): it ended with its host or the first rank
            self._end_without_store(f"{type(error).__name__}: {error}".splitlines()[0])

    def _exchange_or_log(self) -> None:
        """Do one round; log an error of the watchdog's own, which is no reason to end a job, and go on."""
        try:
            self._ignore_suspension()
            self._send()
            agreed = self._receive() or self._propose(diagnose(self.reports, self.limits.silent_s))
        except RuntimeError:
            raise
        except Exception:
            log.exception("the watchdog failed in this round and tries again; please report this error")
            return
        if agreed:
            self._end(hang_diagnosis.decode_diagnosis(agreed))

    def _ignore_suspension(self) -> None:
        """Restart all clocks after the whole job was suspended, as Slurm does."""
        now = time.monotonic()
        if now - self.round_at > self.limits.silent_s / 2:
            heartbeat.progress.beat_at = now
            self.heard_at = [now] * self.world

    def _send(self) -> None:
        """Write this rank's report into the store; the number in front changes with each report."""
        progress, self.sent = heartbeat.progress, self.sent + 1
        limit = getattr(self.limits, f"{progress.phase}_s", self.limits.other_s)
        report = ProgressReport(
            self.rank, self.machine, os.getpid(), self.stacks.fileno(), progress.step, progress.phase,
            progress.micro_batch, progress.transitions, time.monotonic() - progress.beat_at, limit,
            processes.in_collective(torch.cuda.is_initialized()), self.state, self.error,
        )  # fmt: skip
        self.store.set(self.keys[self.rank], f"{self.sent} {hang_diagnosis.encode(report).decode()}")

    def _receive(self) -> bytes:
        """Read the reports of all ranks; return the diagnosis of the first rank that has one."""
        *raw, diagnosis = self.store.multi_get([*self.keys, "diagnosis"])
        now = self.round_at = time.monotonic()
        self.heard_at = [now if new != old else at for new, old, at in zip(raw, self.raw, self.heard_at, strict=True)]
        self.raw = raw
        reports = [hang_diagnosis.decode_report(text.split(b" ", 1)[1]) for text in raw]
        self.reports = [
            report.observed(self._has_ended(report), now - self.heard_at[report.rank]) for report in reports
        ]
        return diagnosis

    def _propose(self, diagnosis: Diagnosis | None) -> bytes:
        """Offer a diagnosis; return that of the rank that had one first, b"" if there is none."""
        if not diagnosis:
            return b""
        text = hang_diagnosis.encode(diagnosis.reported_by(self.rank)).decode()
        return self.store.compare_set("diagnosis", "", text)

    def _has_ended(self, report: ProgressReport) -> bool:
        return report.host == self.machine and processes.state(report.pid) in processes.ENDED

    # -- second thread: needs no other rank ------------------------------------------------------------------------
    def _guard(self) -> None:
        """End the job when the store does not answer; write stacks when no Python thread can run here."""
        last, alone = time.monotonic(), self.world == 1
        while not self.stopping.wait(self.limits.every_s):
            output = sys.__stderr__ if alone and sys.__stderr__ else self.stacks
            faulthandler.dump_traceback_later(STACKS_SHARE * self.limits.silent_s, file=output, exit=alone)
            now = time.monotonic()
            if now - last > self.limits.silent_s / 2:  # this thread was suspended, and so was the other
                self.round_at = now
            if now - self.round_at > self.limits.silent_s:
                self._end_without_store(f"no reply for {now - self.round_at:.0f} s")
            last = now

    def _end_without_store(self, reason: str) -> None:
        """End the job without messages between ranks. No alarm while ranks exit: the store ends with the first."""
        if self.stopping.is_set() or heartbeat.progress.phase == "stop":
            return
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        message = f"the store of the first rank ({address}) is lost ({reason}): its process, host or network is down"
        ended = [report.observed(self._has_ended(report), 0.0) for report in self.reports
                 if report.gone or self._has_ended(report)]  # fmt: skip
        diagnosis = diagnose(ended, self.limits.silent_s) or Diagnosis((0,), message, heartbeat.progress.step)
        self._end(diagnosis.reported_by(self.rank))

    # -- end of the job --------------------------------------------------------------------------------------------
    def _end(self, diagnosis: Diagnosis) -> None:
        """Write stacks to the run folder and the message to stderr, and exit; never wait for what may hang."""
        self.ending.acquire()  # never released: the process ends here
        folder = self.folder / ("start" if diagnosis.step is None else f"step_{diagnosis.step}")
        _run_with_timeout(lambda: self._write(folder, diagnosis), WRITE_S)
        self._kill_unresponsive()
        if diagnosis.reporter == self.rank:
            line = f"oreal: {diagnosis.message}. Stacks of all ranks: {folder}; exit code {LOST}"
            print(line, file=sys.stderr, flush=True)  # logging may be blocked by the thread that hangs
        _run_with_timeout(self._wait_for_writers, PEERS_WRITE_S)
        os._exit(LOST)

    def _write(self, folder: Path, diagnosis: Diagnosis) -> None:
        """Write this rank's stacks; the first responsive rank of a machine also writes those of unresponsive ones."""
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{line}\n" for line in (diagnosis.message, *(report.line() for report in self.reports)))
        if diagnosis.reporter == self.rank:
            (folder / "diagnosis.txt").write_text(text)
        with open(folder / f"rank_{self.rank}.txt", "w") as file:
            print(text, file=file, flush=True)
            faulthandler.dump_traceback(file)
        local = [report for report in self.reports if report.host == self.machine]
        if [report.rank for report in local if not self._unresponsive(report)][:1] == [self.rank]:
            for report in filter(self._unresponsive, local):
                stacks = processes.read_stacks(report.pid, report.stacks_fd)
                (folder / f"rank_{report.rank}.txt").write_text(f"{text}\n{stacks}")

    def _kill_unresponsive(self) -> None:
        """Kill stopped and blocked processes: they answer no other signal, and torchrun would wait for them."""
        for report in self.reports:
            if report.host == self.machine and report.state != hang_diagnosis.DONE and self._unresponsive(report):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(report.pid, signal.SIGKILL)

    def _unresponsive(self, report: ProgressReport) -> bool:
        finished = report.state == hang_diagnosis.DONE
        return report.gone or finished or report.silent_s > STACKS_SHARE * self.limits.silent_s

    def _wait_for_writers(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store ended with the first rank
            self.store.add("written", 1)
            while self.store.add("written", 0) < sum(not self._unresponsive(report) for report in self.reports):
                time.sleep(0.05)


_watchdog: Watchdog | None = None  # one per process, as faulthandler's timer is


def start(config: config.Config) -> None:
    """Watch all ranks until `stop`. Collective; call it after the process group exists."""
    global _watchdog
    if config.watchdog.every_s:
        _watchdog = Watchdog(config)


def stop() -> None:
    """Stop watching, without an alarm."""
    global _watchdog
    if _watchdog:
        _watchdog.stop()
    _watchdog = None


def failed(error: BaseException) -> None:
    """Report an unexpected error before the process ends with it; see Watchdog.failed."""
    if _watchdog:
        _watchdog.failed(error)


def _store(timeout_s: float) -> dist.Store:
    if distributed.world_size() == 1:
        return dist.HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    tcp = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    prefix = distributed.all_gather_object(uuid.uuid4().hex)[0]  # a restart finds the keys of the earlier attempt
    return dist.PrefixStore(prefix, tcp)


def _run_with_timeout(function: Callable[[], None], seconds: float) -> None:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
