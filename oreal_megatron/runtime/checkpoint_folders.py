"""The checkpoints of a run as folders: which are whole, which is newest, which may go. Their contents are mcore's.

checkpoints/
  step_000010/          complete since it bears this name
    manifest.json       every file's size and SHA-256
    policy/ reward_model/
  step_000020.partial/  being written, or left by a run that died
  latest                the name of the newest complete one
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from oreal_megatron.runtime import files

Digests = dict[str, tuple[int, str]]  # path below the checkpoint -> bytes, SHA-256
MANIFEST, LATEST, PARTIAL = "manifest.json", "latest", ".partial"


@dataclass(frozen=True)
class Damage:
    """Why a checkpoint cannot be trusted."""

    path: Path
    what: str

    def __str__(self) -> str:
        return f"checkpoint {self.path.name} is damaged: {self.what}"


def name(step: int) -> str:
    """Of a checkpoint after `step` steps."""
    return f"step_{step:06d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def begin(partial: Path, models: Iterable[str]) -> None:
    """Empty folders to write into; what dead runs left half written goes."""
    for left in partial.parent.glob(f"step_*{PARTIAL}"):
        shutil.rmtree(left)
    for model in models:
        (partial / model).mkdir(parents=True)


def finish(partial: Path, digests: Digests) -> Path:
    """Give a completely written folder its manifest and its name, and make it the latest.

    `digests` are of the files that were measured while they were written; the others are measured now.
    """
    everything = digest_files(partial, [name for name in list_files(partial) if name not in digests]) | digests
    measured = {name: dict(zip(("bytes", "sha256"), everything[name], strict=True)) for name in sorted(everything)}
    files.write_text(partial / MANIFEST, json.dumps({"files": measured}, indent=1) + "\n")
    for folder in sorted({(partial / name).parent for name in everything}):
        files.sync(folder)
    path = partial.with_suffix("")
    if path.exists():  # the run went on from an earlier one
        remove(path)
    os.rename(partial, path)
    make_latest(path)
    return path


def make_latest(path: Path) -> None:
    files.write_text(path.parent / LATEST, path.name + "\n")


def prune(folder: Path, keep: int, keep_every: int) -> None:
    """Delete all but the latest `keep` and those whose step is a multiple of `keep_every` (0: of none)."""
    for path in candidates(folder)[keep:]:
        if not keep_every or step_of(path) % keep_every:
            remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint; one half deleted no longer bears the name of a whole one."""
    going = path.with_name(path.name + ".old" + PARTIAL)
    os.rename(path, going)
    shutil.rmtree(going)


def complete(folder: Path) -> list[Path]:
    """Checkpoints that bear a final name, oldest first."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name))


def candidates(folder: Path) -> list[Path]:
    """Checkpoints to go on from, newest first: the one that `latest` names, and those before it."""
    found, file = complete(folder)[::-1], folder / LATEST
    latest = file.read_text().strip() if file.is_file() else ""
    return [path for path in found if not latest or path.name <= latest]


def damage(path: Path, share: int = 0, shares: int = 1) -> Damage | None:
    """What is wrong with a checkpoint, if anything. Of `shares` readers, each reads its share of the files."""
    try:
        listed = json.loads((path / MANIFEST).read_text())["files"]
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except FileNotFoundError:
        return Damage(path, f"it has no {MANIFEST}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        return Damage(path, f"its {MANIFEST} cannot be read ({error})")
    for name, (size, _) in wanted.items():
        if not (path / name).is_file():
            return Damage(path, f"{name} is missing")
        if (found := (path / name).stat().st_size) != size:
            return Damage(path, f"{name} has {found} bytes, its manifest says {size}")
    for name in sorted(wanted)[share::shares]:
        if digest(path / name) != wanted[name]:
            return Damage(path, f"{name} does not have the SHA-256 of its manifest")
    return None


def list_files(path: Path) -> list[str]:
    """All files below a folder, as paths relative to it."""
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def digest_files(path: Path, names: Iterable[str]) -> Digests:
    return {name: digest(path / name) for name in names}


def digest(file: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file."""
    with open(file, "rb") as stream:
        return file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()
