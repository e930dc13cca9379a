"""Atomic writes, writes that wait for disk space, and reading of JSON objects."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from oreal_megatron.config import ConfigError
from oreal_megatron.runtime import heartbeat

log = logging.getLogger(__name__)
Result = TypeVar("Result")
FINGERPRINT_BYTES = 2**20  # read at each end of a file
RETRY_S = 10.0  # pause between attempts on a full disk
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def make_folder(path: Path, setting: str) -> None:
    """Create a folder and check that a file can be written in it; ConfigError names the setting where it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(
            f"{setting} names {path}, which cannot be written to ({error.strerror}); choose another"
        ) from None


def require_writable(path: Path) -> Path:
    """Return a path at which a file can be written or replaced; ConfigError where it cannot. Creates nothing."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"the folder {path.parent} of {path.name} does not exist; create it first")
    is_new = not path.exists()
    try:
        path.open("ab").close()  # permissions alone say little, to root for example
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another name") from None
    if is_new:
        path.unlink()
    return path


def refuse_same(*paths: Path | None) -> None:
    """Raise ConfigError if two paths, of outputs or of an output and an input, are one file."""
    named: dict[Path, Path] = {}
    for path in filter(None, paths):
        if (other := named.setdefault(path.resolve(), path)) is not path:
            raise ConfigError(f"{other} and {path} are one file, which would be written twice; give them two names")


def set_aside(path: Path) -> Path:
    """Return a path for writing; a file or folder with content there is renamed to the first free NAME.1, NAME.2."""
    has_content = any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0
    if not has_content:
        return path
    number = 1
    while (former := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(former)
    log.info("%s existed already; the former one is now %s", path, former)
    return path


def fingerprint(paths: Iterable[Path]) -> str:
    """Return a digest of the files' names, sizes and ends: tells large files apart, but reads a few megabytes only."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            for start in (0, max(size - FINGERPRINT_BYTES, 0)):
                file.seek(start)
                digest.update(f"{path.name} {size}".encode() + file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()


def digest(paths: Iterable[Path]) -> str:
    """Return a digest of the contents of files, one after the other, read in blocks."""
    result = hashlib.blake2b(digest_size=16)
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                result.update(block)
    return result.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace the contents of a file atomically: not even a crash of the machine leaves half of it."""
    new = path.with_name(path.name + ".new")
    with open(new, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync(path.parent)


def complete_json_lines(path: Path) -> list[Any]:
    """Return the values of a file of JSON lines, [] if it does not exist, without a last line that a crash cut short.

    Raises ConfigError for another damaged line.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    values: list[Any] = []
    for number, line in numbered:
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if number == numbered[-1][0]:
                break
            raise ConfigError(
                f"{path} line {number} is damaged ({error}); remove this line, or restore the file from a copy"
            ) from None
    return values


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise ConfigError if it holds anything else."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__}; expected a JSON object")
    return value


def append_line(path: Path, line: str) -> None:
    """Append a line, or nothing: a partial line on a full disk is removed again."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_when_space(folder: Path, write: Callable[..., Result], *arguments: Any) -> Result:
    """Call `write(*arguments)`, and repeat it while disk or quota are full.

    The wait is logged once. `write` must be repeatable.
    """
    waiting = False
    while True:
        try:
            result = write(*arguments)
        except Exception as error:
            if not is_full(error):
                raise
            if not waiting:
                log.warning("no space left in %s; waiting until there is space, nothing is lost", folder)
                waiting = True
            heartbeat.beat()
            time.sleep(RETRY_S)
            continue
        if waiting:
            log.warning("there is space in %s again; continuing", folder)
        return result


def is_full(error: BaseException | None) -> bool:
    """Return whether an error or its cause is a full disk: torch.save hides the error number."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
