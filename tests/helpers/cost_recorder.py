"""Record CPU seconds, wall seconds and started processes of every test, as lines of JSON in $OREAL_TEST_COSTS."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest

STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn")


def cpu_seconds() -> float:
    """CPU seconds of this process, of its ended children, and of those of multiprocessing's fork server."""
    seconds = sum(os.times()[:4])
    if server := forkserver._forkserver._forkserver_pid:
        fields = Path(f"/proc/{server}/stat").read_text().rsplit(")", 1)[1].split()
        seconds += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return seconds


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
        before, begin, self.starts = cpu_seconds(), time.monotonic(), 0
        result = yield
        row = {
            "test": item.nodeid,
            "cpu_s": round(cpu_seconds() - before, 2),
            "wall_s": round(time.monotonic() - begin, 2),
            "processes": self.starts,
        }
        with self.file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        return result


def main(file: Path) -> None:
    """Print CPU and wall seconds per tier, and the tests that cost most."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    tiers: dict[str, list[dict]] = {}
    for row in rows:
        tiers.setdefault(row["test"].split("/")[1], []).append(row)
    for tier, group in tiers.items():
        cpu, wall = (sum(row[field] for row in group) for field in ("cpu_s", "wall_s"))
        print(f"{tier:8} {len(group):5} tests {wall:7.0f} s {cpu:7.0f} CPU seconds")
    for row in sorted(rows, key=lambda row: -row["cpu_s"])[:10]:
        print(f"{row['cpu_s']:7.1f} CPU seconds {row['test'][:100]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
