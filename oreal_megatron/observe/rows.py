"""JSON Lines files of a run: one object per line, appended as the run proceeds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oreal_megatron.runtime import files

Row = dict[str, Any]


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Append one line; wait while the disk is full."""
    files.write_when_space(file.parent, files.append_line, file, json.dumps(row))


def read_rows(file: Path) -> list[Row]:
    """Return the lines of a file, [] if it does not exist; a last line that a crash cut short is dropped."""
    lines = file.read_text().splitlines() if file.is_file() else []
    with contextlib.suppress(json.JSONDecodeError):
        return [json.loads(line) for line in lines]
    return [json.loads(line) for line in lines[:-1]]


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file by these lines, atomically."""
    files.write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
