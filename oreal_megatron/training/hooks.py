"""What happens between two steps of training: save and evaluate when due, leave when asked to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from oreal_megatron.config import Config, Preempted
from oreal_megatron.mcore import checkpoint_state
from oreal_megatron.mcore.checkpoint_saver import Saver
from oreal_megatron.observe.recorder import Recorder
from oreal_megatron.runtime import checkpoint_folders, distributed, heartbeat
from oreal_megatron.runtime.preemption import Notice


@dataclass
class TrainingHooks:
    """Implementation of protocols.StepHooks. Collective."""

    config: Config
    saver: Saver
    run: Recorder
    evaluate: Callable[[], dict[str, float]] | None  # held-out accuracy of the engine's weights; None: no problems
    notice: Notice
    keep_best: Callable[[], None]  # the policy that was evaluated just now is the best so far

    def begin(self, done: int, saved: bool) -> None:
        """Before the first step of this start; `saved`: it goes on from the checkpoint of `done`."""
        self.saved = done if saved else None
        self._remember(done)
        self._evaluate_if_due()  # a run may have ended between saving and evaluating

    def after_step(self, done: int) -> None:
        self._remember(done)
        with self.run.phase("checkpoint"):
            self.saver.poll()
            if due(done, self.config.checkpoint.every, self.config.steps):
                self.saver.start(done)
                self.saved = done
                self.run.delete_old_dumps(checkpoint_folders.complete(self.saver.folder)[-self.saver.keep :])
        if any(distributed.all_gather_object(bool(self.notice))):
            raise Preempted(f"asked to leave after step {done}")
        self._evaluate_if_due()

    @contextlib.contextmanager
    def saving_when_asked_to_leave(self) -> Iterator[None]:
        """Save what is not saved yet before a notice ends the run."""
        try:
            yield
        except Preempted:
            with heartbeat.phase("checkpoint"):
                self._save_last()
            raise Preempted(
                f"asked to leave, and saved after step {self.done}; go on with --resume {self.config.run}"
            ) from None

    def _save_last(self) -> None:
        """The state after the last whole step. Nothing has changed it since: generating reads the weights only, and
        whoever began to update them has finished the step."""
        self.saver.finish()
        if self.saved != self.done:
            self.saver.save(self.done, self.random_state)

    def _remember(self, done: int) -> None:
        self.done, self.random_state = done, checkpoint_state.random_state()

    def _evaluate_if_due(self) -> None:
        done, config = self.done, self.config
        if (
            self.evaluate
            and due(done, config.evaluation.every, config.steps)
            and not self.run.metrics.is_evaluated(done)
        ):
            with self.run.phase("evaluate"):
                self.run.metrics.log_evaluation(done, self.evaluate())
            if done and self.run.metrics.is_best(done):
                with self.run.phase("checkpoint"):
                    self.keep_best()


def due(done: int, every: int, steps: int) -> bool:
    """Before the first step, every so many steps, and after the last."""
    return done in (0, steps) or (every > 0 and done % every == 0)
