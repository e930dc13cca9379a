"""Checkpoint folders of a run: complete ones, the newest, damage, deletion. mcore/ writes their contents.

checkpoints/
  step_000010/          complete: it gets this name last
    manifest.json       every file's size and SHA-256
    policy/ reward_model/
  step_000020.partial/  being written, or left by a run that crashed
  latest                name of the newest complete one
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
    """Reason why a checkpoint cannot be loaded."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"checkpoint {self.path.name} is damaged: {self.reason}"


def name(step: int) -> str:
    """Return the folder name of a checkpoint after `step` steps."""
    return f"step_{step:06d}"


def step_of(path: Path) -> int:
    """Return the number of steps before a checkpoint."""
    return int(path.name.removeprefix("step_"))


def begin(partial: Path, models: Iterable[str]) -> None:
    """Create empty folders to write into, and delete incomplete checkpoints of earlier runs."""
    for incomplete in partial.parent.glob(f"step_*{PARTIAL}"):
        shutil.rmtree(incomplete)
    for model in models:
        (partial / model).mkdir(parents=True)


def finish(partial: Path, digests: Digests) -> Path:
    """Give a completely written folder its manifest and its final name, and make it the latest.

    `digests`: of files that were hashed while they were written; the others are hashed now.
    """
    everything = digest_files(partial, [name for name in list_files(partial) if name not in digests]) | digests
    measured = {name: dict(zip(("bytes", "sha256"), everything[name], strict=True)) for name in sorted(everything)}
    files.write_text(partial / MANIFEST, json.dumps({"files": measured}, indent=1) + "\n")
    for folder in sorted({(partial / name).parent for name in everything}):
        files.sync(folder)
    path = partial.with_suffix("")
    if path.exists():  # the run was resumed from an earlier checkpoint
        remove(path)
    os.rename(partial, path)
    make_latest(path)
    return path


def make_latest(path: Path) -> None:
    """Record a checkpoint as the newest one."""
    files.write_text(path.parent / LATEST, path.name + "\n")


def latest_name(folder: Path) -> str:
    """Return the name of the newest checkpoint as recorded, empty where none is."""
    return (folder / LATEST).read_text().strip() if (folder / LATEST).is_file() else ""


def prune(folder: Path, keep: int, keep_every: int) -> None:
    """Delete all but the latest `keep` and the multiples of `keep_every` steps (0: no multiples)."""
    for path in candidates(folder)[keep:]:
        if not keep_every or step_of(path) % keep_every:
            remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint. It loses its final name first, so that a crash leaves no damaged one."""
    obsolete = path.with_name(path.name + ".old" + PARTIAL)
    os.rename(path, obsolete)
    shutil.rmtree(obsolete)


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name))


def candidates(folder: Path) -> list[Path]:
    """Return the checkpoints to resume from, newest first: the latest and those before it."""
    paths, latest = complete(folder)[::-1], latest_name(folder)
    return [path for path in paths if not latest or path.name <= latest]


def damage(path: Path, share: int = 0, shares: int = 1) -> Damage | None:
    """Return what is wrong with a checkpoint, or None. Each of `shares` readers hashes its share of the files."""
    try:
        listed = json.loads((path / MANIFEST).read_text())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except FileNotFoundError:
        return Damage(path, f"it has no {MANIFEST}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        return Damage(path, f"its {MANIFEST} cannot be read ({error})")
    for name, (size, _) in expected.items():
        if not (path / name).is_file():
            return Damage(path, f"{name} is missing")
        if (actual := (path / name).stat().st_size) != size:
            return Damage(path, f"{name} has {actual} bytes, the manifest says {size}")
    for name in sorted(expected)[share::shares]:
        if digest(path / name) != expected[name]:
            return Damage(path, f"{name} does not have the SHA-256 of the manifest")
    return None


def list_files(path: Path) -> list[str]:
    """Return all files below a folder, as paths relative to it."""
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def digest_files(path: Path, names: Iterable[str]) -> Digests:
    """Return bytes and SHA-256 of files of a folder."""
    return {name: digest(path / name) for name in names}


def digest(file: Path) -> tuple[int, str]:
    """Return bytes and SHA-256 of a file."""
    with open(file, "rb") as stream:
        return file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()
