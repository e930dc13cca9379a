"""Find the ranks that block a job, from the progress reports of all ranks. Pure: no clock, thread or process group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

RUNNING, FAILING, FAILED, DONE = "running", "failing", "failed", "done"  # failing: has an error, still alive


@dataclass(frozen=True)
class ProgressReport:
    """Progress of one rank as it reports it, and what the receiving rank has observed of it."""

    rank: int
    host: str  # host name and namespace of process ids
    pid: int
    stacks_fd: int  # file descriptor of that process, to which faulthandler writes its stacks
    step: int | None
    phase: str
    micro_batch: int | None
    transitions: int  # changes of step or phase so far
    idle_s: float  # seconds since its last progress
    limit_s: float  # seconds without progress that its phase may take
    in_collective: bool  # as far as its Python stacks show, or waits for its GPU (processes.in_collective)
    state: str = RUNNING
    error: str = ""
    gone: bool = False  # observed: its process has ended
    silent_s: float = 0.0  # observed: seconds since its last report

    @property
    def position(self) -> str:
        """Phase, step and micro-batch as text."""
        step = "" if self.step is None else f" of step {self.step}"
        micro_batch = "" if self.micro_batch is None else f", micro-batch {self.micro_batch}"
        return f"phase {self.phase}{step}{micro_batch}"

    @property
    def late(self) -> bool:
        """True if its phase makes no progress for longer than allowed."""
        return self.idle_s > self.limit_s

    def observed(self, gone: bool, silent_s: float) -> ProgressReport:
        """Return the report with the receiver's observations."""
        return replace(self, gone=gone, silent_s=silent_s)

    def line(self) -> str:
        """Return the report as one line for diagnosis.txt."""
        waits = ", waits in a collective" if self.in_collective else ""
        idle = f"no progress for {self.idle_s:.1f} s"
        return f"rank {self.rank}: {self.position}, {idle}{waits}, {self.state} {self.error}"


@dataclass(frozen=True)
class Diagnosis:
    """Reason to end the job."""

    ranks: tuple[int, ...]  # the ranks that block the others
    message: str
    step: int | None  # step of the first of them
    reporter: int = 0  # the rank that found it first, and prints the message

    def reported_by(self, rank: int) -> Diagnosis:
        """Return the diagnosis as found by a rank."""
        return replace(self, reporter=rank)


def encode(value: ProgressReport | Diagnosis) -> bytes:
    """Encode a report or a diagnosis for the store."""
    return json.dumps(asdict(value)).encode()


def decode_report(text: bytes) -> ProgressReport:
    """Decode a report."""
    return ProgressReport(**json.loads(text))


def decode_diagnosis(text: bytes) -> Diagnosis:
    """Decode a diagnosis."""
    fields = json.loads(text)
    return Diagnosis(**fields | {"ranks": tuple(fields["ranks"])})


def diagnose(reports: Sequence[ProgressReport], silent_limit_s: float) -> Diagnosis | None:
    """Return the lost ranks; else the ranks the others wait for, once one of them exceeds its phase's limit."""
    return _find_lost(reports, silent_limit_s) or _find_hung([report for report in reports if report.state == RUNNING])


def _find_lost(reports: Sequence[ProgressReport], silent_limit_s: float) -> Diagnosis | None:
    lost = [report for report in reports if report.state != DONE and (report.gone or report.silent_s > silent_limit_s)]
    failed = [report for report in reports if report.state == FAILED or report in lost and report.state == FAILING]
    killed = [report for report in lost if report not in failed]
    if killed:  # first: errors of other ranks are those of their collectives with the killed ones
        return _diagnosis(killed, "lost, last seen in", "; ".join(map(_describe_loss, killed)))
    if failed:
        return _diagnosis(failed, "lost, last seen in", "; ".join(f"it ended with {report.error}" for report in failed))
    return None


def _describe_loss(report: ProgressReport) -> str:
    if report.gone:
        return f"process {report.pid} on {report.host} ended without an error message (killed, or out of memory?)"
    return (
        f"no report from process {report.pid} on {report.host} for {report.silent_s:.0f} s (process stopped or blocked "
        "in native code that holds Python's lock, or host or network down?)"
    )


def _find_hung(running: Sequence[ProgressReport]) -> Diagnosis | None:
    """Ranks in a collective wait for those outside it, and ranks ahead wait for those behind."""
    active = [report for report in running if not report.in_collective]
    if not active:
        deadlock = bool(running) and all(report.late for report in running)
        return _diagnosis(running, "hung in", "all wait for each other in collectives") if deadlock else None
    earliest = min(report.transitions for report in active)
    late = [report for report in active if report.transitions == earliest and report.late]
    limits = "; ".join(f"no progress for {report.idle_s:.0f} s, {report.limit_s:g} s allowed" for report in late)
    return _diagnosis(late, "hung in", limits) if late else None


def _diagnosis(blocking: Sequence[ProgressReport], state: str, reason: str) -> Diagnosis:
    ranks = tuple(report.rank for report in blocking)
    names = f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"
    positions = "; ".join(dict.fromkeys(report.position for report in blocking))
    return Diagnosis(ranks, f"{names} {state} {positions}: {reason}", blocking[0].step)
