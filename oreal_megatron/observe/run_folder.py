"""The run folder: configuration, environment, metrics.jsonl, TensorBoard events, rollouts of every step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter

from oreal_megatron import verify
from oreal_megatron.algo import guard
from oreal_megatron.config import Config, ConfigError
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.observe import dumps, speed
from oreal_megatron.observe.dumps import Values
from oreal_megatron.observe.progress import Bar
from oreal_megatron.records import Batch, Rollout, TokenWeights, Verdict
from oreal_megatron.runtime import checkpoint_folders, distributed, files, heartbeat, versions

log = logging.getLogger(__name__)


class Run:
    """Written by the first rank; the other ranks measure phases, and some dump their share of the batch."""

    def __init__(
        self,
        config: Config,
        first_step: int = 0,
        inputs: dict[str, str] | None = None,
        share: tuple[int, int] | None = (0, 1),  # of every batch, which this rank dumps, and of how many; None: none
        arch: Architecture | None = None,  # of the policy, to count operations
        peak: float | None = None,  # operations per second of a GPU, where they are known
    ):
        self.config, self.first_step, self.path, self.share = config, first_step, Path(config.run), share
        self.writes = distributed.rank() == 0
        self.meter = speed.Meter(config, arch, peak)
        if not self.writes:
            return
        (self.path / "rollouts").mkdir(parents=True, exist_ok=True)
        write_header(config, inputs or {}, first_step, peak)
        self._forget_from(first_step)
        self.events = SummaryWriter(str(self.path / "tensorboard"), purge_step=first_step)

    @contextlib.contextmanager
    def steps(self) -> Iterator[Iterator[int]]:
        """The step numbers still to do, under a progress bar."""
        bar = Bar(f"oreal {self.path.name}", self.config.steps, self.writes, self.first_step)
        with bar as self.bar:
            self.meter.start()
            yield self._numbers()

    def _numbers(self) -> Iterator[int]:
        for step in range(self.first_step, self.config.steps):
            heartbeat.step(step)
            yield step

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Measure the seconds of one phase of the step, on this rank."""
        return self.meter.phase(name)

    def log(
        self,
        step: int,
        metrics: dict[str, float],
        rollouts: Sequence[Sequence[Rollout]],
        verdicts: Sequence[Sequence[Verdict]],
    ) -> None:
        """Write one step, and how fast it was. Collective."""
        row = {"step": step, **metrics, **self.meter.step(metrics, rollouts)}
        if not self.writes:
            return
        self._write_rollouts(step, rollouts, verdicts)
        append_row(self.path / "metrics.jsonl", row)
        self._draw(step, row)
        self.bar.advance(1, f"pass rate {metrics['reward/pass_rate']:.3f}, kept {metrics['batch/samples']}")

    def dump(
        self, step: int, batch: Batch, reference_logp: Values, token_weights: TokenWeights, metrics: dict[str, float]
    ) -> None:
        """Write the step's training inputs for `oreal replay`, and report a step that a model skipped."""
        path = self.path / "dumps" / checkpoint_folders.name(step)
        if self.share:
            self.meter.trains_on(batch)
            try:
                dumps.write(path, step, self.share, batch, reference_logp, token_weights, metrics, self.config)
            except (OSError, SafetensorError) as error:  # a full disk, say: a dump is not worth a run
                log.warning(f"step {step} could not be dumped for oreal replay: {error}")
        if self.writes and (models := guard.skipped_models(metrics)):
            reason = guard.skip_reason(metrics)
            line = f"{' and '.join(models)} skipped step {step}: {reason}; inspect it with oreal replay {path}"
            self.bar.console.print(line, highlight=False)

    def forget_dumps(self, checkpoints: Sequence[Path]) -> None:
        """Of the steps before these checkpoints, which can no longer be reached."""
        if self.writes and checkpoints:
            dumps.forget(self.path, lambda name: name < checkpoints[0].name)

    def log_evaluation(self, step: int, result: dict[str, float]) -> None:
        """Held-out accuracy of the policy after `step` steps."""
        if not self.writes:
            return
        append_row(self.path / "evaluations.jsonl", {"step": step, **result})
        self._draw(step, {f"evaluation/{name}": value for name, value in result.items()})

    def evaluated(self, step: int) -> bool:
        """Whether the policy after `step` steps has been evaluated, on all ranks. Collective."""
        rows = read_rows(self.path / "evaluations.jsonl") if self.writes else []
        return distributed.all_gather_object(any(row["step"] == step for row in rows))[0]

    def best(self, step: int) -> bool:
        """Whether the policy after `step` steps is better than all that were evaluated before. Collective."""
        rows = read_rows(self.path / "evaluations.jsonl") if self.writes else []
        here = [row["accuracy"] for row in rows if row["step"] == step]
        return distributed.all_gather_object(all(row["accuracy"] < here[-1] for row in rows if row["step"] < step))[0]

    def _write_rollouts(self, step: int, rollouts: Any, verdicts: Any) -> None:
        lines = [rollout_line(r, v) for row_r, row_v in zip(rollouts, verdicts, strict=True)
                 for r, v in zip(row_r, row_v, strict=True)]  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines)
        files.with_room(self.path, files.write_text, self.path / "rollouts" / f"step_{step:06d}.jsonl", text)

    def _draw(self, step: int, values: dict[str, float]) -> None:
        """TensorBoard events; they are copies, and a full disk costs no more than them."""
        try:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
        except OSError as error:
            log.warning(f"TensorBoard events of step {step} are lost ({error}); metrics.jsonl has them")
            self.events = SummaryWriter(str(self.path / "tensorboard"))

    def _forget_from(self, step: int) -> None:
        """Drop what an interrupted run wrote at or after the step that is done again."""
        dumps.forget(self.path, lambda name: name >= checkpoint_folders.name(step))
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            file = self.path / name
            last = step if name == "evaluations.jsonl" else step - 1
            rows = [row for row in read_rows(file) if row["step"] <= last]
            files.write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def refuse_existing(config: Config) -> None:
    """A new run never writes over an old one."""
    path = Path(config.run)
    if (path / "config.json").exists():
        resumable = any(path.glob("checkpoints/step_*[0-9]"))
        first = f"go on with --resume {path}" if resumable else "it has no checkpoint to go on from: delete it"
        raise ConfigError(f"run folder {path} exists already; {first}, or name another with --set run=FOLDER")


def write_header(config: Config, inputs: dict[str, str], first_step: int = 0, peak: float | None = None) -> None:
    """config.json and environment.json; what an earlier start of the run wrote is kept beside them."""
    path = Path(config.run)
    path.mkdir(parents=True, exist_ok=True)
    environment = versions.environment() | {"verifier": verify.VERSION, "inputs": inputs}
    environment["hardware"] = speed.hardware(peak)
    for name, content in (("config", dataclasses.asdict(config)), ("environment", environment)):
        file = path / f"{name}.json"
        if file.exists():
            shutil.copy(file, path / f"{name}_before_step_{first_step}.json")
        _write_json(file, content)


def refuse_changed(run: Path, inputs: dict[str, str]) -> None:
    """A resumed run must read what it read before: the starting policy is its reference, the prompts its order."""
    before = files.read_object(run / "environment.json").get("inputs", {})
    for name, digest in inputs.items():
        if before.get(name, digest) != digest:
            raise ConfigError(f"{name} has changed since the run {run} was started; put the old one back to resume it")


def append_row(file: Path, row: dict[str, Any]) -> None:
    files.with_room(file.parent, files.append_line, file, json.dumps(row))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Lines of a JSONL file of ours; a last line that a crash cut off is left out."""
    lines = file.read_text().splitlines() if file.is_file() else []
    with contextlib.suppress(json.JSONDecodeError):
        return [json.loads(line) for line in lines]
    return [json.loads(line) for line in lines[:-1]]


def rollout_line(rollout: Rollout, verdict: Verdict) -> dict[str, Any]:
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


def _write_json(path: Path, value: Any) -> None:
    files.write_text(path, json.dumps(value, indent=2) + "\n")
