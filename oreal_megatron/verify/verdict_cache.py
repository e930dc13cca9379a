"""Judge verdicts that survive a restart: an append-only JSONL file, one line per verdict."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path


def cache_key(*parts: str) -> str:
    """One key for (question, gold, answer, judge, prompt version); no two lists of parts share their text."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class VerdictCache:
    """key -> "correct" or "incorrect". UNKNOWN is never kept. Several processes may append to one file."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._known: dict[str, str] = {}
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._load()

    def _load(self) -> None:
        with self._path.open("rb") as lines:
            for line in lines:
                try:
                    key, outcome = json.loads(line)
                except (ValueError, TypeError):
                    continue  # a line cut by a crash is asked again
                if outcome in ("correct", "incorrect"):
                    self._known[key] = outcome

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> str | None:
        return self._known.get(key)

    def put(self, key: str, outcome: str) -> None:
        if outcome not in ("correct", "incorrect") or key in self._known:
            return
        self._known[key] = outcome
        if self._path is not None:
            line = json.dumps([key, outcome]).encode() + b"\n"
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, self._opening() + line)  # one write: lines of several processes do not mix
            finally:
                os.close(handle)

    def _opening(self) -> bytes:
        """A newline first where a crash left the file in the middle of a line."""
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return b""
            file.seek(-1, os.SEEK_END)
            return b"" if file.read(1) == b"\n" else b"\n"
