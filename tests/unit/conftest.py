"""Fixtures of the unit tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[3] / "shared/data"


@pytest.fixture
def shared_rows() -> Callable[[str], list[dict[str, Any]]]:
    """Return a reader of the JSONL files of ../shared/data; it skips the test where a file is missing."""

    def read(name: str) -> list[dict[str, Any]]:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"../shared/data/{name} is missing: its figure is not checked")
        return [json.loads(line) for line in path.read_bytes().splitlines()]

    return read
