"""Trackers: services that get copies of the metrics. A failure of one, or one that hangs, never stops a run.

Each works in a thread of its own. `metrics.jsonl` and `evaluations.jsonl` have every value; values that a tracker loses
are lost there only.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import importlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from oreal_megatron.config import Config
from oreal_megatron.config.schema import config_keys

log = logging.getLogger(__name__)
Values = tuple[int, dict[str, float]]
MOST_WAITING = 1000  # steps that a tracker may be behind
CLOSE_S = 30.0  # at the end of the process
MLFLOW_RUN = "mlflow_run.txt"  # in the run folder: the run that a resumed run continues


class Tracker(Protocol):
    """A receiver of the metrics of a step or of an evaluation."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take values at a step."""
        ...

    def close(self) -> None:
        """Send the last values."""
        ...


class TensorBoard:
    """TensorBoard events in RUN/tensorboard."""

    def __init__(self, config: Config, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = str(Path(config.run) / "tensorboard")
        self.start = SummaryWriter
        self.events = SummaryWriter(self.folder, purge_step=first_step)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add scalars. After a full disk, later steps go into another file."""
        try:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
        except OSError as error:
            log.warning("TensorBoard events of step %d are lost (%s); metrics.jsonl has the values", step, error)
            self.events = self.start(self.folder)

    def close(self) -> None:
        """Write the last events."""
        self.events.close()


class Wandb:
    """A run of Weights & Biases; its own variables choose project, entity and mode."""

    def __init__(self, config: Config, first_step: int):
        wandb = importlib.import_module("wandb")
        run = Path(config.run)
        name = hashlib.blake2b(str(run.resolve()).encode(), digest_size=8).hexdigest()
        settings = dataclasses.asdict(config)
        self.run = wandb.init(dir=str(run), name=run.name, id=name, resume="allow", config=settings)
        self.run.define_metric("*", step_metric="step")  # steps that are taken again come after later ones

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Log one row."""
        self.run.log({**values, "step": step})

    def close(self) -> None:
        """Upload the last rows."""
        self.run.finish()


class Mlflow:
    """A run of MLflow; its own variables choose server and experiment."""

    def __init__(self, config: Config, first_step: int):
        self.mlflow = importlib.import_module("mlflow")
        file = Path(config.run) / MLFLOW_RUN
        if first_step and file.is_file():
            self.mlflow.start_run(run_id=file.read_text().strip())
            return
        run = self.mlflow.start_run(run_name=Path(config.run).name)
        file.write_text(f"{run.info.run_id}\n")
        self.mlflow.log_params({key.path: str(key.value)[:500] for key in config_keys(config)})

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""
        self.mlflow.log_metrics({name: float(value) for name, value in values.items()}, step=step)

    def close(self) -> None:
        """End the run on the server."""
        self.mlflow.end_run()


PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
KINDS: dict[str, Callable[[Config, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}


class TrackerThread:
    """A tracker in a thread, with a queue before it."""

    def __init__(self, name: str, config: Config, first_step: int):
        self.name, self.waiting = name, queue.Queue[Values | None](MOST_WAITING)
        self.failed = False
        self.thread = threading.Thread(target=self._run, args=(config, first_step), name=f"tracker-{name}", daemon=True)
        try:  # here: a process that is forked while another thread imports may hang
            importlib.import_module(PACKAGES[name])
            self.thread.start()
        except Exception as error:  # a broken installation raises anything
            self._fail(f"{type(error).__name__}: {error}")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Queue the values of a step; never blocks."""
        if self.failed:
            return
        try:
            self.waiting.put_nowait((step, dict(values)))
        except queue.Full:
            self._fail(f"it is {MOST_WAITING} steps behind")

    def close(self, limit_s: float) -> None:
        """Wait for the queued values, at most so long."""
        with contextlib.suppress(queue.Full):
            self.waiting.put_nowait(None)
        if not self.failed:
            self.thread.join(limit_s)
        if self.thread.is_alive() and not self.failed:
            self._fail(f"it did not take the last values within {limit_s:g} s")

    def _run(self, config: Config, first_step: int) -> None:
        try:
            tracker = KINDS[self.name](config, first_step)
            while (values := self.waiting.get()) is not None:
                tracker.add(*values)
            tracker.close()
        except Exception as error:  # services raise anything
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        self.failed = True
        log.warning("%s is left out from now on (%s); metrics.jsonl has every value", self.name, reason)


class Trackers:
    """All trackers of a run. One that fails is reported once and left out until the next start."""

    def __init__(self, config: Config, first_step: int = 0):
        self.threads = [TrackerThread(name, config, first_step) for name in config.record.trackers]
        atexit.register(self.close)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Give values to every working tracker."""
        for thread in self.threads:
            thread.add(step, values)

    def close(self, limit_s: float = CLOSE_S) -> None:
        """Let every tracker take the last values. A second call does nothing."""
        atexit.unregister(self.close)
        for thread in self.threads:
            thread.close(limit_s)
        self.threads = []
