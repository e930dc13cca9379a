"""Record the CPU seconds, wall seconds and started processes of every test, as lines of JSON in $OREAL_TEST_COSTS."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn")


class CostRecorder:
    """Pytest plugin; CPU time includes children that have ended and were waited for."""

    def __init__(self, file: Path):
        self.file, self.starts = file, 0
        sys.addaudithook(self.count)

    def count(self, event: str, _: tuple) -> None:
        """Count the starts of processes."""
        self.starts += event in STARTS

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Measure a test with the fixtures that it is the first to need."""
        before, begin, self.starts = sum(os.times()[:4]), time.monotonic(), 0
        result = yield
        row = {
            "test": item.nodeid,
            "cpu_s": round(sum(os.times()[:4]) - before, 2),
            "wall_s": round(time.monotonic() - begin, 2),
            "processes": self.starts,
        }
        with self.file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        return result
