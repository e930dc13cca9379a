"""Rows of data files: JSON Lines, Parquet, and such files of the Hugging Face hub.

A fault is named with its file and line; rows of a Parquet file are counted as lines, from 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from oreal_megatron.config import ConfigError
from oreal_megatron.runtime import files

Line = dict[str, Any]
HUB = "hub:"  # hub:OWNER/DATASET:FILE


def read_lines(path: str) -> Iterator[tuple[int, Line]]:
    """Yield number and values of each line that is not blank; raise ConfigError where there is none."""
    file = local_file(path)
    is_empty = True
    for number, line in (_parquet_rows if file.suffix == ".parquet" else _json_lines)(path, file):
        is_empty = False
        yield number, line
    if is_empty:
        raise ConfigError(f"data file {path} is empty")


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    """Write lines one by one under another name, then give the file its own; a former file is set aside."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    except BaseException:
        partial.unlink()
        raise
    files.set_aside(path)
    partial.rename(path)


def local_file(path: str) -> Path:
    """Return the file of a path, downloaded for `hub:OWNER/DATASET:FILE`; ConfigError where there is none."""
    if path.startswith(HUB):
        return _download(path)
    file = Path(path)
    if path and file.is_dir():
        raise ConfigError(f"data file {path} is a folder; name a file in it")
    if file.is_file():
        return file
    hint = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and file.suffix not in (".jsonl", ".json", ".parquet"):
        hint = f"; for a dataset of the Hugging Face hub name a file of it: {HUB}{path}:FILE.jsonl (or .parquet)"
    raise ConfigError(f"data file {path or '(none given)'} does not exist{hint}")


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    expected = f"{name}: expected {HUB}OWNER/DATASET:FILE.jsonl (or .parquet)"
    try:
        _, repository, file = name.split(":")
    except ValueError:
        raise ConfigError(expected) from None
    if not repository or not file:
        raise ConfigError(expected)
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(f"{name} could not be downloaded: {error}") from None


def _json_lines(path: str, file: Path) -> Iterator[tuple[int, Line]]:
    with open(file, "rb") as lines:
        for number, text in enumerate(lines, 1):
            if text.strip():
                yield number, _parse(f"{path} line {number}", text)


def _parse(name: str, text: bytes) -> Line:
    """Return the JSON object of one line."""
    try:
        line = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply to be read; expected a flat JSON object") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} is not JSON ({error.msg}); expected one JSON object in each line") from None
    except ValueError as error:  # of integers with thousands of digits
        raise ConfigError(f"{name} is not JSON: {error}") from None
    if not isinstance(line, dict):
        raise ConfigError(f"{name} is {type(line).__name__}; expected a JSON object")
    if b"\\ud" in text.lower():
        _refuse_surrogates(name, line)
    return line


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON value; write null for a missing one")


def _refuse_surrogates(name: str, line: Line) -> None:
    r"""Raise ConfigError for half a character, such as \ud800, which no tokenizer can read and no file can store."""
    try:
        json.dumps(line, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ConfigError(
            f"{name} holds {half}, half of a character written as two \\u escapes; add the other half or remove it"
        ) from None


def _parquet_rows(path: str, file: Path) -> Iterator[tuple[int, Line]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(
            f"{path} is a Parquet file, which needs pyarrow: pip install pyarrow, or convert it to JSON Lines"
        ) from None
    try:
        rows = parquet.read_table(file).to_pylist()
    except Exception as error:  # a damaged file: pyarrow's own errors
        raise ConfigError(f"{path} cannot be read as Parquet: {error}") from None
    yield from enumerate(rows, 1)
