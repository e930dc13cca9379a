"""Progress marker of this rank. The main thread writes it, runtime/watchdog.py reads it. Not collective."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class Progress:
    """Step, phase and time of the last progress."""

    step: int | None = None  # None: before the first step
    phase: str = "start"
    micro_batch: int | None = None
    transitions: int = 0  # changes of step or phase so far: equal on ranks that are equally far
    beat_at: float = field(default_factory=time.monotonic)


progress = Progress()


def beat(micro_batch: int | None = None) -> None:
    """Report progress within the phase: an engine step, a micro-batch or a graded response is finished."""
    progress.micro_batch = micro_batch
    progress.beat_at = time.monotonic()


def step(number: int) -> None:
    """Begin a step."""
    progress.step = number
    _enter("step")


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark the body as a phase. After an error, the phase stays, so that the watchdog can report it."""
    outer = progress.phase
    _enter(name)
    yield
    _enter(outer)


def _enter(phase: str) -> None:
    progress.phase = phase
    progress.transitions += 1
    beat()
