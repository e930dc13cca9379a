"""Input and output file of `oreal verify`: checks before anything starts, and errors as sentences."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from oreal_megatron.config import ConfigError
from oreal_megatron.runtime import files


def check(source: Path, output: Path) -> None:
    """Raise ConfigError for an input that is no file, and for an output that is a folder or the input."""
    if not source.is_file():
        needs = "give a JSONL file with `gold` and `pred` (or `response`) on each line"
        raise ConfigError(f"{source} is not a file; {needs}")
    if output.exists() and output.samefile(source):
        raise ConfigError(f"the output {output} is the input; give another name")
    files.require_writable(output)


def open_output(path: Path) -> TextIO:
    """Open the output for writing. Raises ConfigError where that is not possible."""
    try:
        return path.open("w")
    except OSError as error:
        raise ConfigError(f"the output {path} cannot be written: {error.strerror}; give another file") from None


def count_lines(path: Path) -> int:
    """Count the lines of a file that are not blank."""
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
