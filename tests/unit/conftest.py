"""Fixtures of the unit tests: shared data, and scripted judge servers as processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[3] / "shared/data"
SCRIPT = Path(__file__).parents[1] / "helpers/scripted_judge.py"


@pytest.fixture
def shared_rows() -> Callable[[str], list[dict[str, Any]]]:
    """Return a reader of the JSONL files of ../shared/data; it skips the test where a file is missing."""

    def read(name: str) -> list[dict[str, Any]]:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"../shared/data/{name} is missing: its figure is not checked")
        return [json.loads(line) for line in path.read_bytes().splitlines()]

    return read


class JudgeServer:
    """One scripted judge process."""

    def __init__(self, *behaviours: str, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *behaviours],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PORT": str(port)},
        )
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> list[str]:
        """End the server and return the user messages it received."""
        self.process.kill()
        return [json.loads(line) for line in self.process.communicate()[0].splitlines()]


@pytest.fixture
def judge_server() -> Iterator[Callable[..., JudgeServer]]:
    """Return a function that starts a scripted judge; all of them end with the test."""
    servers: list[JudgeServer] = []

    def start(*behaviours: str, port: int = 0) -> JudgeServer:
        servers.append(JudgeServer(*behaviours, port=port))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()
        server.process.stdout.close()


@pytest.fixture
def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
