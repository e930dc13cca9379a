"""JSON Lines files of a run: one object per line, appended as the run proceeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oreal_megatron.config import ConfigError
from oreal_megatron.runtime import files

Row = dict[str, Any]


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Append one line; wait while the disk is full."""
    files.write_when_space(file.parent, files.append_line, file, json.dumps(row))


def read_rows(file: Path) -> list[Row]:
    """Return the lines of a file, [] if it does not exist; a last line that a crash cut short is dropped.

    Raises ConfigError for another line that is no JSON object.
    """
    rows = files.complete_json_lines(file)
    for row in rows:
        if not isinstance(row, dict):
            raise ConfigError(f"{file} holds {row!r:.100}; expected one JSON object per line, so remove this line")
    return rows


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file by these lines, atomically."""
    files.write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
