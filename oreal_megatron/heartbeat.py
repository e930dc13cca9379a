"""Where this rank is and when it last got on. Whoever works writes it, observe/watchdog.py reads it. No collective."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class Place:
    step: int | None = None  # None: before the first
    phase: str = "start"
    micro_batch: int | None = None
    borders: int = 0  # of steps and phases crossed so far: equal on ranks that are equally far
    beat_at: float = field(default_factory=time.monotonic)


here = Place()


def beat(micro_batch: int | None = None) -> None:
    """Something was finished within the phase: an engine step, a micro-batch, a graded answer."""
    here.micro_batch = micro_batch
    here.beat_at = time.monotonic()


def step(number: int) -> None:
    """A step begins."""
    here.step = number
    _cross("step")


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """What is done inside belongs to a phase. One that failed stays the place of this rank."""
    outer = here.phase
    _cross(name)
    yield
    _cross(outer)


def _cross(phase: str) -> None:
    here.phase = phase
    here.borders += 1
    beat()
