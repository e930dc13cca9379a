"""The run folder: configuration, environment and the rollouts of every step.

RUN/config.json, environment.json         what was run, on what (header)
    metrics.jsonl, evaluations.jsonl      metrics_log.py
    calibration.jsonl                     metrics_log.py
    tensorboard/                          metrics_log.py
    rollouts/step_000013.jsonl            one line per rollout
    dumps/step_000013/                    dumps.py
    checkpoints/, policy/, best/          training/hooks.py
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from oreal_megatron import verify
from oreal_megatron.config import Config, ConfigError
from oreal_megatron.observe import speed
from oreal_megatron.observe.rows import Row
from oreal_megatron.records import Rollout, Verdict
from oreal_megatron.runtime import files, versions


class RunFolder:
    """Layout of one run folder, and the files in it that are written once or once per step."""

    def __init__(self, config: Config):
        self.config, self.path = config, Path(config.run)

    def write_header(
        self, fingerprints: Mapping[str, str], first_step: int = 0, peak_flops: float | None = None
    ) -> None:
        """Write config.json and environment.json; keep those of an earlier start under another name."""
        (self.path / "rollouts").mkdir(parents=True, exist_ok=True)
        environment = versions.environment() | {"verifier": verify.VERSION, "inputs": dict(fingerprints)}
        environment["hardware"] = speed.hardware(peak_flops)
        for name, content in (("config", dataclasses.asdict(self.config)), ("environment", environment)):
            file = self.path / f"{name}.json"
            if file.exists():
                shutil.copy(file, self.path / f"{name}_before_step_{first_step}.json")
            files.write_text(file, json.dumps(content, indent=2) + "\n")

    def write_rollouts(
        self, step: int, rollouts: Sequence[Sequence[Rollout]], verdicts: Sequence[Sequence[Verdict]]
    ) -> None:
        """Write [P, K] rollouts with their verdicts, one line each; wait while the disk is full."""
        rows = [
            rollout_row(*graded)
            for prompt_rows in zip(rollouts, verdicts, strict=True)
            for graded in zip(*prompt_rows, strict=True)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        files.write_when_space(self.path, files.write_text, self.path / "rollouts" / f"step_{step:06d}.jsonl", text)


def refuse_existing(config: Config) -> None:
    """Raise ConfigError if the run folder holds a run already."""
    path = Path(config.run)
    if (path / "config.json").exists():
        resumable = any(path.glob("checkpoints/step_*[0-9]"))
        first = f"continue it with --resume {path}" if resumable else "it has no checkpoint to resume from: delete it"
        raise ConfigError(f"run folder {path} exists already; {first}, or choose another with --set run=FOLDER")


def refuse_changed(run: Path, fingerprints: Mapping[str, str]) -> None:
    """Raise ConfigError if model or data differ from those the run was started with.

    The starting policy is the reference of the run, and the order of the prompts depends on the data file.
    """
    before = files.read_object(run / "environment.json").get("inputs", {})
    for name, digest in fingerprints.items():
        if before.get(name, digest) != digest:
            raise ConfigError(f"{name} has changed since the run {run} was started; restore it to resume the run")


def rollout_row(rollout: Rollout, verdict: Verdict) -> Row:
    """Return one rollout and its verdict as a JSON object."""
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
    }
