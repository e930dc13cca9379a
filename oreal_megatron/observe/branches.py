"""Branches of a run: what a run wrote after the step it goes back to, set aside as a run folder of its own.

RUN/branches/after_step_000002/     the former steps from 2 on
    config.json, environment.json   as they were
    metrics.jsonl, evaluations.jsonl  of all steps, those before the branch too
    checkpoints/, rollouts/, dumps/, policy/, best/, reward_model/  only those after step 2
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

from oreal_megatron.observe import run_folder
from oreal_megatron.runtime import checkpoint_folders, rollout_files

FOLDER = "branches"
COPIED = ("config.json", "environment.json", *run_folder.LOGS, "speed.json")


def set_aside(run: Path, step: int) -> Path | None:
    """Move what lies after `step` steps into a new branch folder, if a checkpoint or model does; return the folder.

    The checkpoint of `step` becomes the latest first: whatever interrupts the move, later ones are not loaded again.
    """
    checkpoints = [path for path in checkpoint_folders.complete(run / "checkpoints") if _step(path) > step]
    models = [run / name for name in run_folder.MODELS if _is_after(run / name, step, bool(checkpoints))]
    if not checkpoints and not models:
        return None
    newest = checkpoint_folders.latest_name(run / "checkpoints")
    checkpoint_folders.make_latest(run / "checkpoints" / checkpoint_folders.name(step))
    run_folder.keep_header(run, step)
    branch = _new_folder(run, step)
    for name in COPIED:
        if (run / name).is_file():
            shutil.copy(run / name, branch)
    for path in [*checkpoints, *models, *_records(run, step), *run_folder.headers_after(run, step)]:
        target = branch / path.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, target)
    if checkpoints:
        own = {path.name for path in checkpoints}
        checkpoint_folders.make_latest(branch / "checkpoints" / (newest if newest in own else max(own)))
    return branch


def _step(path: Path) -> int:
    return checkpoint_folders.step_of(path)


def _is_after(model: Path, step: int, if_unknown: bool) -> bool:
    """Return whether a saved policy is of a later step; `if_unknown`: the answer where it does not record its step."""
    if not model.is_dir():
        return False
    return run_folder.saved_model(model).get("step", math.inf if if_unknown else -1) > step


def _records(run: Path, step: int) -> list[Path]:
    """Return rollouts and dumps of the steps after the first `step` ones."""
    rollouts = [file for later, files in rollout_files.files_by_step(run).items() if later >= step for file in files]
    dumps = [path for path in (run / "dumps").glob("step_*") if path.name >= checkpoint_folders.name(step)]
    return sorted([*rollouts, *dumps])


def _new_folder(run: Path, step: int) -> Path:
    name = f"after_{checkpoint_folders.name(step)}"
    folder, number = run / FOLDER / name, 1
    while folder.exists():
        number += 1
        folder = run / FOLDER / f"{name}_{number}"
    folder.mkdir(parents=True)
    return folder
