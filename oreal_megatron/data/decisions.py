"""Decisions about the lines of a file, kept beside the output: what was dropped and why, and the place to resume at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from oreal_megatron.config import ConfigError
from oreal_megatron.data.lines import Line
from oreal_megatron.runtime import files

SUFFIX = ".decisions.jsonl"


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return the numbers of dropped lines by reason, most frequent first; "" stands for lines that stay."""
    dropped = sorted(((count, reason) for reason, count in counts.items() if reason), reverse=True)
    return ", ".join(f"{count} {reason}" for count, reason in dropped)


class Decisions:
    """File OUT.decisions.jsonl: a header that names input and settings, then one line for each line of the input.

    A start with the same header continues after the last complete line; another one is refused.
    """

    def __init__(self, output: Path, header: dict[str, object]):
        self.path = output.with_name(output.name + SUFFIX)
        lines = self._read(header)
        self.earlier: dict[int, str] = {line["line"]: line["dropped"] for line in lines}
        files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in (header, *lines)))
        self._file = open(self.path, "a")

    def __enter__(self) -> Decisions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, number: int, reason: str) -> None:
        """Write the decision about a line: the reason for dropping it, "" if it stays."""
        self._file.write(json.dumps({"line": number, "dropped": reason}) + "\n")
        self._file.flush()

    def remove(self) -> None:
        """Remove the file, so that a start with other settings is not refused."""
        self.path.unlink()

    def _read(self, header: dict[str, object]) -> list[Line]:
        if not self.path.is_file():
            return []
        first, *others = files.complete_json_lines(self.path) or [{}]
        if first != json.loads(json.dumps(header)):
            raise ConfigError(f"{self.path} is of another input or other settings; remove it, or write to another file")
        return others
