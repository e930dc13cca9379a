"""The run folder: configuration, environment and the rollouts of every step.

RUN/config.json, environment.json         what was run, on what (header)
    metrics.jsonl, evaluations.jsonl      metrics_log.py
    calibration.jsonl                     metrics_log.py
    tensorboard/, mlflow_run.txt          trackers.py
    recipe and functions are in environment.json: config/user_functions.py
    rollouts/step_000013.jsonl            one line per rollout; with several replicas runtime/rollout_files.py
    dumps/step_000013/                    dumps.py
    checkpoints/, policy/, best/          training/hooks.py
    branches/after_step_000013/           branches.py
    config_before_step_13.json, environment_before_step_13.json   header in force until a start at that step
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from oreal_megatron import verify
from oreal_megatron.config import Config, ConfigError, user_functions
from oreal_megatron.config.user_functions import Origin
from oreal_megatron.observe import speed
from oreal_megatron.observe.rows import Row, read_rows
from oreal_megatron.records import Rollout, Verdict
from oreal_megatron.runtime import files, rollout_files, versions

NO_ORIGIN = Origin()
HEADERS = ("config", "environment")
SAVED_MODEL = "saved_model.json"  # in the folder of a saved model: the step it is of
MODELS = ("best", "policy", "reward_model")  # folders of saved models
LOGS = ("metrics.jsonl", "evaluations.jsonl", "calibration.jsonl")
WRITTEN = (
    *(f"{name}.json" for name in HEADERS),
    *(*LOGS, "speed.json", "mlflow_run.txt"),
    *("tensorboard", "checkpoints", "rollouts", "dumps", "branches", *MODELS),
)


class RunFolder:
    """Layout of one run folder, and the files in it that are written once or once per step."""

    def __init__(self, config: Config):
        self.config, self.path = config, Path(config.run)

    def write_header(
        self,
        fingerprints: Mapping[str, str],
        first_step: int = 0,
        peak_flops: float | None = None,
        origin: Origin = NO_ORIGIN,
    ) -> None:
        """Write config.json and environment.json; keep those of the steps before under another name."""
        (self.path / rollout_files.FOLDER).mkdir(parents=True, exist_ok=True)
        keep_header(self.path, first_step)
        recipe = dataclasses.asdict(origin.recipe) if origin.recipe else self._recorded_recipe(first_step)
        environment = versions.environment() | {"verifier": verify.VERSION, "inputs": dict(fingerprints)}
        environment["hardware"] = speed.hardware(peak_flops)
        functions = {key: dataclasses.asdict(source) for key, source in user_functions.sources(self.config).items()}
        environment |= {"command": origin.command, "recipe": recipe, "functions": functions}
        for name, content in (("config", dataclasses.asdict(self.config)), ("environment", environment)):
            files.write_text(self.path / f"{name}.json", json.dumps(content, indent=2) + "\n")

    def _recorded_recipe(self, first_step: int) -> object:
        """Return the recipe that the run was started with; None for a run that begins without a recipe."""
        file = self.path / "environment.json"
        return files.read_object(file).get("recipe") if first_step and file.is_file() else None

    def write_rollouts(
        self,
        step: int,
        rollouts: Sequence[Sequence[Rollout]],
        verdicts: Sequence[Sequence[Verdict]],
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        """Write those of the [P, K] rollouts that a replica generated, with verdicts; wait while the disk is full."""
        rows = [
            rollout_row(rollout, verdict)
            for prompt_rows in zip(rollouts, verdicts, strict=True)
            for rollout, verdict in zip(*prompt_rows, strict=True)
            if rollout.replica(replicas) == replica
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        file = rollout_files.file_of(self.path, step, replica, replicas)
        files.write_when_space(self.path, files.write_text, file, text)

    def delete_rollouts_from(self, step: int) -> None:
        """Delete the rollouts of `step` and later ones, which are taken again."""
        self._delete_rollouts(lambda written: written >= step)

    def delete_rollouts_before(self, step: int) -> None:
        """Delete the rollouts of the steps before `step`."""
        self._delete_rollouts(lambda written: written < step)

    def _delete_rollouts(self, is_chosen: Callable[[int], bool]) -> None:
        for step, paths in rollout_files.files_by_step(self.path).items():
            for path in paths if is_chosen(step) else ():
                path.unlink()


def header_before(run: Path, step: int, name: str = "config") -> Path:
    """Return the file of the settings, or of the environment, that the first `step` steps were taken with."""
    starts = [start for start in _starts(run, name) if start >= step]
    return run / (f"{name}_before_step_{min(starts)}.json" if starts else f"{name}.json")


def headers_after(run: Path, step: int) -> list[Path]:
    """Return the header files that starts after `step` steps left."""
    return [
        run / f"{name}_before_step_{start}.json" for name in HEADERS for start in _starts(run, name) if start > step
    ]


def keep_header(run: Path, step: int) -> None:
    """Copy the header of the first `step` steps to the name under which it outlasts a start there."""
    for name in HEADERS if step else ():
        source, target = header_before(run, step, name), run / f"{name}_before_step_{step}.json"
        if source.is_file() and not target.exists():
            shutil.copy(source, target)


def _starts(run: Path, name: str) -> list[int]:
    """Return the steps of the starts whose former header is there."""
    prefix = f"{name}_before_step_"
    numbers = (file.stem.removeprefix(prefix) for file in run.glob(f"{prefix}*.json"))
    return sorted(int(number) for number in numbers if number.isdigit())


def refuse_existing(config: Config) -> None:
    """Raise ConfigError if the run folder holds a run, or anything that a run would overwrite."""
    path = Path(config.run)
    present = [name for name in WRITTEN if _has_content(path / name)]
    if not present:
        return
    if any(path.glob("checkpoints/step_*[0-9]")) and "config.json" in present:
        raise ConfigError(
            f"run folder {path} exists already; continue it with --resume {path}, or choose another with "
            "--set run=FOLDER"
        )
    raise ConfigError(
        f"{path} holds {', '.join(present)} already, and no checkpoint to resume from; choose another run folder with "
        "--set run=FOLDER, or delete this one first"
    )


def check_logs(run: Path) -> None:
    """Raise ConfigError for a damaged line of a log, which a resumed run would read after everything is loaded."""
    for name in LOGS:
        read_rows(run / name)


def logged_steps(run: Path) -> int:
    """Return the number of steps that the metrics of a run folder reach."""
    return 1 + max((row["step"] for row in read_rows(run / "metrics.jsonl")), default=-1)


def model_note(step: int, **figures: float) -> dict[str, str]:
    """Return name and text of the file that records, in the folder of a saved model, the step it is of."""
    return {SAVED_MODEL: json.dumps({"step": step, **figures}) + "\n"}


def saved_model(model: Path) -> dict[str, float]:
    """Return step and figures recorded in the folder of a saved model, {} without a record."""
    return files.read_object(model / SAVED_MODEL) if (model / SAVED_MODEL).is_file() else {}


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def rollout_row(rollout: Rollout, verdict: Verdict) -> Row:
    """Return one rollout and its verdict as a JSON object."""
    details: Row = {name: text for name in ("reason", "penalty") if (text := getattr(verdict, name))}
    if verdict.reward is not None:
        details["reward"] = verdict.reward
    if rollout.versions:
        details["versions"] = [list(run) for run in rollout.versions]
    return {
        "question": rollout.prompt.question,
        "gold_answer": rollout.prompt.gold,
        "slot": rollout.slot,
        "index": rollout.index,
        "response": rollout.text,
        "tokens": len(rollout.tokens),
        "finished": rollout.finished,
        "verdict": verdict.outcome.value,
        "method": verdict.method,
        "extracted": verdict.extracted,
        **details,
    }
