"""Judge verdicts that survive a restart: an append-only JSONL file, one line per verdict."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from oreal_megatron.config import ConfigError


def cache_key(*parts: str) -> str:
    """Return the key of (question, gold, answer, judge, prompt version); different parts have different keys."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def check_file(path: str) -> None:
    """Raise ConfigError for a cache that cannot be written; "" is no file. Creates nothing."""
    if not path:
        return
    file = Path(path).absolute()
    folder = next(parent for parent in file.parents if parent.exists())
    if file.is_dir() or not folder.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise ConfigError(f"the judge's cache {path} cannot be written; name a file in a folder that can be")


class VerdictCache:
    """Map of keys to "correct" or "incorrect"; "unknown" is never stored. Several processes may share one file."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._known: dict[str, str] = {}
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._load(self._path)
        except OSError as error:
            raise ConfigError(
                f"the judge's cache {path} cannot be used ({error.strerror}); name another file"
            ) from None

    def _load(self, path: Path) -> None:
        with path.open("rb") as lines:
            for line in lines:
                try:
                    key, outcome = json.loads(line)
                except (ValueError, TypeError):
                    continue  # a line cut by a crash; the judge decides that answer again
                if outcome == "wrong":  # the word of version 0.1
                    outcome = "incorrect"
                if outcome in ("correct", "incorrect"):
                    self._known[key] = outcome

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> str | None:
        """Return the stored outcome, or None."""
        return self._known.get(key)

    def put(self, key: str, outcome: str) -> None:
        """Store "correct" or "incorrect" under a key that is new; ignore anything else."""
        if outcome not in ("correct", "incorrect") or key in self._known:
            return
        self._known[key] = outcome
        if self._path is not None:
            line = json.dumps([key, outcome]).encode() + b"\n"
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, _missing_newline(self._path) + line)  # one write: processes do not mix their lines
            finally:
                os.close(handle)


def _missing_newline(path: Path) -> bytes:
    """Return a newline where a crash left the file in the middle of a line, else nothing."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return b""
        file.seek(-1, os.SEEK_END)
        return b"" if file.read(1) == b"\n" else b"\n"
