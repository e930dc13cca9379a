"""Judge servers as processes, and small helpers of the verifier's tests."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED = HERE.parents[3] / "shared" / "data"


class JudgeServer:
    """One scripted judge process."""

    def __init__(self, *behaviours, port=0):
        environment = {**os.environ, "PORT": str(port)}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE.parents[1] / "helpers/scripted_judge.py"), *behaviours],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self):
        """Ends the server; returns the user messages it was sent."""
        self.process.kill()
        return [json.loads(line) for line in self.process.communicate()[0].splitlines()]


@pytest.fixture
def judge_server():
    servers = []

    def start(*behaviours, port=0):
        servers.append(JudgeServer(*behaviours, port=port))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()
        server.process.stdout.close()


@pytest.fixture
def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def shared_rows():
    """Rows of a file of ../shared/data; skips, and says so, where it is not there."""

    def read(name):
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"../shared/data/{name} is not here: the figure on it is not checked")
        return [json.loads(line) for line in path.read_bytes().splitlines()]

    return read
