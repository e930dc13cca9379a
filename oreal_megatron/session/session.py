"""Start and stop what a command runs with: process group, watchdog, engine, grader, Megatron.

    with Session(config) as session:
        engine, verifier = session.start_engine(inputs)
        session.start_megatron()

Whatever was started is stopped when the block ends, also by an error: no process, no shared memory stays behind.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from oreal_megatron.config import Config, ConfigError, RunStopped
from oreal_megatron.rollout import batch_invariance
from oreal_megatron.runtime import distributed, heartbeat, watchdog
from oreal_megatron.runtime.folder_lock import FolderLock
from oreal_megatron.runtime.preemption import StopRequest
from oreal_megatron.session.inputs import Inputs

if TYPE_CHECKING:  # they import vLLM and torch's process pools, which takes seconds
    from oreal_megatron.rollout.engine import VllmEngine
    from oreal_megatron.verify.step_verifier import StepVerifier

log = logging.getLogger(__name__)


class Session:
    """Process group and watchdog of this rank, and what is started on top of them. Every method is collective."""

    def __init__(self, config: Config):
        self.config = config
        self.engine: VllmEngine | None = None
        self.verifier: StepVerifier | None = None
        self.folder_lock: FolderLock | None = None  # on the first rank

    def __enter__(self) -> Session:
        """Join torchrun's process group and start the watchdog."""
        from oreal_megatron.mcore import parallel

        batch_invariance.prepare(self.config.engine)
        parallel.start_process_group(self.config.watchdog.collective_s)
        watchdog.start(self.config)
        return self

    def lock(self, folder: Path) -> None:
        """Make this job the only writer of a folder until the session ends. Raises ConfigError, on all ranks."""
        refusal, lock = "", FolderLock(folder)
        if distributed.rank() == 0:
            try:
                lock.acquire()
                self.folder_lock = lock
            except ConfigError as error:
                refusal = str(error)
        if refusal := distributed.all_gather_object(refusal)[0]:
            raise ConfigError(refusal)

    def start_engine(self, inputs: Inputs, stop_request: StopRequest | None = None) -> tuple[VllmEngine, StepVerifier]:
        """Start vLLM and the grader of its rollouts. Generation ends early once `stop_request` is set."""
        self.engine, self.verifier = start_engine(inputs, stop_request)
        return self.engine, self.verifier

    def start_megatron(self) -> None:
        """Make Megatron's groups. A running engine sleeps, so that the models find its memory free."""
        from oreal_megatron.mcore import parallel

        if self.engine:
            self.engine.sleep()
        parallel.start_megatron(self.config.parallel, self.config.seed, self.config.watchdog.collective_s)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop what was started, in reverse order; after an error without waiting for the other ranks."""
        try:
            self._stop() if error is None else self._stop_after(error)
        finally:
            if self.folder_lock:
                self.folder_lock.release()

    def _stop_after(self, error: BaseException) -> None:
        if isinstance(error, Exception) and not isinstance(error, ConfigError | RunStopped):
            watchdog.failed(error)  # ends the process here where another rank was lost
        watchdog.stop()
        with contextlib.suppress(Exception):  # the error that is on its way matters more
            if self.verifier:
                self.verifier.close()
        with contextlib.suppress(Exception):
            if self.engine:
                self.engine.close()

    def _stop(self) -> None:
        """Stop what was started, together with the other ranks."""
        from oreal_megatron.mcore import parallel

        if self.verifier:
            self.verifier.close()
        with heartbeat.phase("stop"):
            parallel.stop(self.engine)
        watchdog.stop()


def start_engine(inputs: Inputs, stop_request: StopRequest | None = None) -> tuple[VllmEngine, StepVerifier]:
    """Start vLLM and the grader of its rollouts, without a Session around them. Collective."""
    from oreal_megatron.rollout.engine import VllmEngine
    from oreal_megatron.verify.grader import Grader
    from oreal_megatron.verify.step_verifier import StepVerifier

    config = inputs.config
    engine = VllmEngine(config, inputs.stop_tokens, inputs.tokenizer, lambda: bool(stop_request))
    return engine, StepVerifier(Grader(config.verify), config.verify.unknown_limit)
