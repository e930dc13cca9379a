"""Files of a run's rollouts, one JSON object for each rollout: their names, and how those of a step are read.

RUN/rollouts/step_000013.jsonl                     the rollouts of a step, with one engine replica
RUN/rollouts/step_000013.replica_004_of_032.jsonl  those of one replica of several, written by its first rank
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from oreal_megatron.config import ConfigError

Row = dict[str, Any]
FOLDER = "rollouts"
NAME = re.compile(r"step_(\d+)(?:\.replica_(\d+)_of_(\d+))?\.jsonl")
LEAVE_OUT = "remove the file to leave its step out"


def file_of(run: Path, step: int, replica: int = 0, replicas: int = 1) -> Path:
    """Return the file of the rollouts that a replica generated in a step."""
    part = f".replica_{replica:03d}_of_{replicas:03d}" if replicas > 1 else ""
    return run / FOLDER / f"step_{step:06d}{part}.jsonl"


def files_by_step(run: Path) -> dict[int, list[Path]]:
    """Return the files in a run folder by their step, in rising order, also of steps that lack one."""
    files: dict[int, list[Path]] = {}
    for file in sorted((run / FOLDER).glob("*.jsonl")):
        if name := NAME.fullmatch(file.name):
            files.setdefault(int(name[1]), []).append(file)
    return dict(sorted(files.items()))


def complete_steps(run: Path) -> dict[int, list[Path]]:
    """Return the files of the steps that have those of all replicas: a crash may leave some of them."""
    return {step: files for step, files in files_by_step(run).items() if _is_complete(files)}


def read(
    files: Sequence[Path], numbered_rows: Callable[[Path], Iterable[tuple[int, Row]]] | None = None
) -> list[tuple[str, Row]]:
    """Return the rollouts of a step with their file and line; those of several replicas by slot, then index.

    `numbered_rows` reads one file. Raises ConfigError for a line that is not a rollout.
    """
    read_file = numbered_rows or _numbered_rows
    written = [file for file in files if len(files) == 1 or file.stat().st_size]  # a replica may have had none
    rows = [(f"{file} line {number}", row) for file in written for number, row in read_file(file)]
    return sorted(rows, key=_key) if len(files) > 1 else rows


def _is_complete(files: Sequence[Path]) -> bool:
    """Return whether a step has the files of all replicas."""
    names = [name for file in files if (name := NAME.fullmatch(file.name))]
    return {len(files)} == {int(name[3] or 1) for name in names}


def _key(named_row: tuple[str, Row]) -> tuple[int, int]:
    location, row = named_row
    if not (isinstance(row.get("slot"), int) and isinstance(row.get("index"), int)):
        raise ConfigError(f"{location} has no slot and index; {LEAVE_OUT}")
    return row["slot"], row["index"]


def _numbered_rows(file: Path) -> Iterator[tuple[int, Row]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{file} line {number} is damaged ({error}); {LEAVE_OUT}") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{file} line {number} holds {type(row).__name__}, not a rollout; {LEAVE_OUT}")
            yield number, row
