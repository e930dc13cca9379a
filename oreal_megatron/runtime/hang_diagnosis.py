"""Who keeps a job from going on, judged from what its ranks told. Pure: no clock, no thread, no process group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

RUNNING, FAILING, FAILED, DONE = "running", "failing", "failed", "done"  # failing: with an error, and still there


@dataclass(frozen=True)
class Report:
    """What a rank tells the others, and what was found out about it since."""

    rank: int
    host: str  # name and process-id namespace
    pid: int
    stacks: int  # its file descriptor that a stuck interpreter's stacks are written to
    step: int | None
    phase: str
    micro_batch: int | None
    borders: int
    idle_s: float  # since its last beat
    limit_s: float  # that its phase may go without one
    waits: bool  # in a collective, as far as its Python stacks show
    state: str = RUNNING
    error: str = ""  # that it failed with
    gone: bool = False  # found out: its process has ended
    silent_s: float = 0.0  # found out: since it was last heard

    @property
    def place(self) -> str:
        step = "" if self.step is None else f" of step {self.step}"
        micro_batch = "" if self.micro_batch is None else f", micro-batch {self.micro_batch}"
        return f"phase {self.phase}{step}{micro_batch}"

    @property
    def late(self) -> bool:
        return self.idle_s > self.limit_s

    def found(self, gone: bool, silent_s: float) -> Report:
        return replace(self, gone=gone, silent_s=silent_s)

    def line(self) -> str:
        waits = ", waits in a collective" if self.waits else ""
        return f"rank {self.rank}: {self.place}, {self.idle_s:.1f} s without a beat{waits}, {self.state} {self.error}"


@dataclass(frozen=True)
class Diagnosis:
    """Why the job ends."""

    guilty: tuple[int, ...]
    sentence: str
    step: int | None  # of the guilty
    by: int = 0  # the rank that came to it first, and speaks

    def said_by(self, rank: int) -> Diagnosis:
        return replace(self, by=rank)


def encode(value: Report | Diagnosis) -> bytes:
    return json.dumps(asdict(value)).encode()


def report(text: bytes) -> Report:
    return Report(**json.loads(text))


def verdict(text: bytes) -> Diagnosis:
    fields = json.loads(text)
    return Diagnosis(**fields | {"guilty": tuple(fields["guilty"])})


def judge(reports: Sequence[Report], silent_limit_s: float) -> Diagnosis | None:
    """The ranks that are lost; else those that the others wait for, once one of them is over its phase's limit."""
    return _lost(reports, silent_limit_s) or _stuck([one for one in reports if one.state == RUNNING])


def _lost(reports: Sequence[Report], silent_limit_s: float) -> Diagnosis | None:
    lost = [one for one in reports if one.state != DONE and (one.gone or one.silent_s > silent_limit_s)]
    failed = [one for one in reports if one.state == FAILED or one in lost and one.state == FAILING]
    killed = [one for one in lost if one not in failed]  # before the others: their errors are those of its collectives
    if killed:
        return _verdict(killed, "lost, last seen in", "; ".join(map(_loss, killed)))
    if failed:
        return _verdict(failed, "lost, last seen in", "; ".join(f"it ended with {one.error}" for one in failed))
    return None


def _loss(one: Report) -> str:
    if one.gone:
        return f"its process {one.pid} on {one.host} has ended without a word (killed, or out of memory?)"
    return (
        f"nothing was heard of its process {one.pid} on {one.host} for {one.silent_s:.0f} s (stopped, stuck inside "
        "native code with Python's lock, or the host or the network is gone?)"
    )


def _stuck(running: Sequence[Report]) -> Diagnosis | None:
    """Ranks in a collective wait for those that are not, and ranks ahead for those behind."""
    active = [one for one in running if not one.waits]
    if not active:
        together = bool(running) and all(one.late for one in running)
        return _verdict(running, "stuck in", "all wait in collectives, for each other") if together else None
    behind = min(one.borders for one in active)
    late = [one for one in active if one.borders == behind and one.late]
    limits = "; ".join(f"no beat for {one.idle_s:.0f} s, {one.limit_s:g} s allowed" for one in late)
    return _verdict(late, "stuck in", limits) if late else None


def _verdict(guilty: Sequence[Report], what: str, why: str) -> Diagnosis:
    ranks = tuple(one.rank for one in guilty)
    names = f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"
    places = "; ".join(dict.fromkeys(one.place for one in guilty))
    return Diagnosis(ranks, f"{names} {what} {places}: {why}", guilty[0].step)
