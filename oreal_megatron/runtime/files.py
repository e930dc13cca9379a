"""Files that are whole or not there, writes that wait for room instead of failing, JSON that is what it should be."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from oreal_megatron.config import ConfigError
from oreal_megatron.runtime import heartbeat

Result = TypeVar("Result")
log = logging.getLogger(__name__)
PAUSE_S = 10.0  # between looks at a full disk
FULL = (errno.ENOSPC, errno.EDQUOT)


def write_text(path: Path, text: str) -> None:
    """Replace a file by one that holds `text`: at no moment is it half written, not even if the machine dies."""
    new = path.with_name(path.name + ".new")
    with open(new, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync(path.parent)


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__}; wanted a JSON object")
    return value


def append_line(path: Path, line: str) -> None:
    """Append a line, or nothing: what a full disk cut off is taken back."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def with_room(folder: Path, write: Callable[..., Result], *arguments: Any) -> Result:
    """Call `write(*arguments)`, again and again while it fails because the disk or the quota is full.

    It says once that it waits, and for what. `write` must bear being repeated.
    """
    told = False
    while True:
        try:
            result = write(*arguments)
        except Exception as error:
            if not is_full(error):
                raise
            if not told:
                log.warning("no space left in %s; waiting until there is some, nothing is lost", folder)
                told = True
            heartbeat.beat()
            time.sleep(PAUSE_S)
            continue
        if told:
            log.warning("there is space in %s again; continuing", folder)
        return result


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one underneath it, says that there is no room: torch.save hides the number."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
