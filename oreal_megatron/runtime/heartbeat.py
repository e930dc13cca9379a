"""Where this rank is and when it last got on. Whoever works writes it, runtime/watchdog.py reads it. No collective."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class Progress:
    step: int | None = None  # None: before the first
    phase: str = "start"
    micro_batch: int | None = None
    borders: int = 0  # of steps and phases crossed so far: equal on ranks that are equally far
    beat_at: float = field(default_factory=time.monotonic)


progress = Progress()


def beat(micro_batch: int | None = None) -> None:
    """Something was finished within the phase: an engine step, a micro-batch, a graded answer."""
    progress.micro_batch = micro_batch
    progress.beat_at = time.monotonic()


def step(number: int) -> None:
    """A step begins."""
    progress.step = number
    _cross("step")


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """What is done inside belongs to a phase. One that failed stays the place of this rank."""
    outer = progress.phase
    _cross(name)
    yield
    _cross(outer)


def _cross(phase: str) -> None:
    progress.phase = phase
    progress.borders += 1
    beat()
