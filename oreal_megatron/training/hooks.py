"""Work between two steps of training: save and evaluate when due, stop when a signal asked for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from oreal_megatron.config import Config, Preempted
from oreal_megatron.mcore import checkpoint_state
from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver
from oreal_megatron.observe.recorder import Recorder
from oreal_megatron.observe.run_folder import model_note
from oreal_megatron.protocols import Metrics
from oreal_megatron.runtime import checkpoint_folders, distributed, heartbeat
from oreal_megatron.runtime.preemption import StopRequest


@dataclass
class TrainingHooks:
    """Implementation of protocols.StepHooks. Every method is collective."""

    config: Config
    saver: CheckpointSaver
    run: Recorder
    evaluate: Callable[[], Metrics] | None  # held-out accuracy of the engine's weights; None: no problems
    stop_request: StopRequest
    save_model: Callable[[Path, Mapping[str, str]], None]  # writes a folder, with the text of further files by name
    best: Path | None  # folder of the best model so far; None: it is not saved
    figure: str = "accuracy"  # of an evaluation, which the best one has highest
    command: str = "oreal train"  # which continues the run folder with --resume
    # Parameters and optimizer come to the device for a checkpoint; an engine awake would need a smaller KV cache.
    sleep_engine: Callable[[], None] = lambda: None
    wake_engine: Callable[[], object] = lambda: None  # with the policy's weights

    def start(self, steps_done: int, saved: bool) -> None:
        """Evaluate before the first step of this start; `saved`: there is a checkpoint after `steps_done` steps."""
        self.saved_step = steps_done if saved else None
        self._remember_state(steps_done)
        self._evaluate_if_due()  # a run may have ended between saving and evaluating

    def after_step(self, steps_done: int) -> None:
        """Save, stop or evaluate, whichever is due after `steps_done` steps. Raises Preempted."""
        self._remember_state(steps_done)
        with self.run.phase("checkpoint"):
            self.saver.poll()
            if is_due(steps_done, self.config.checkpoint.every, self.config.steps):
                self.sleep_engine()
                self.saver.start(steps_done)
                self.wake_engine()
                self.saved_step = steps_done
                self.run.delete_old_dumps(checkpoint_folders.complete(self.saver.folder)[-self.saver.keep :])
        if any(distributed.all_gather_object(bool(self.stop_request))):
            raise Preempted(f"stopped by a signal after step {steps_done}")
        self._evaluate_if_due()

    @contextlib.contextmanager
    def saving_on_stop_request(self) -> Iterator[None]:
        """Save the state after the last whole step when a stop request ends the run, and tell how to continue."""
        try:
            yield
        except Preempted:
            with heartbeat.phase("checkpoint"):
                self._save_last_state()
            raise Preempted(
                f"stopped by a signal; step {self.steps_done} is saved. Continue with: "
                f"{self.command} --resume {self.config.run}"
            ) from None

    def _save_last_state(self) -> None:
        """Save the last complete step unless it is saved.

        Nothing has changed since then: generation only reads the weights, and an update that had begun was finished.
        """
        self.saver.finish()
        if self.saved_step != self.steps_done:
            self.sleep_engine()
            self.saver.save(self.steps_done, self.random_state)

    def _remember_state(self, steps_done: int) -> None:
        self.steps_done, self.random_state = steps_done, checkpoint_state.random_state()

    def _evaluate_if_due(self) -> None:
        step, metrics = self.steps_done, self.run.metrics
        if self.evaluate is None or not is_due(step, self.config.evaluation.every, self.config.steps):
            return
        if not metrics.is_evaluated(step):
            with self.run.phase("evaluate"):
                metrics.log_evaluation(step, self.evaluate())
        if self.best is None:
            return
        value = metrics.value_if_best(step, self.figure, self.best)  # also where a former start could not save it
        if value is not None:
            with self.run.phase("checkpoint"):
                self.save_model(self.best, model_note(step, **{self.figure: value}))


def is_due(steps_done: int, every: int, steps: int) -> bool:
    """Return whether something due every so many steps is due: before the first, every so many, and after the last."""
    return steps_done in (0, steps) or (every > 0 and steps_done % every == 0)
