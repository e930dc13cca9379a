"""Being asked to leave: SIGTERM and SIGUSR1 come from Slurm, Kubernetes and torchrun some time before they kill."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

from oreal_megatron.runtime.exit_codes import PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_NOTICE_S = 5.0  # a scheduler and torchrun may both pass on one and the same notice


class Notice:
    """Whether this process was asked to leave. A later, second signal ends it at once."""

    def __init__(self) -> None:
        self.given_at: float | None = None

    def __bool__(self) -> bool:
        return self.given_at is not None

    def listen(self) -> Notice:
        """Take the signals from now on; on the main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._take)
        return self

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.given_at is None:
            self.given_at = now
            # Not print: the signal may have come in the middle of one.
            os.write(sys.stderr.fileno(), b"oreal: asked to leave; finishing the step's update, then saving\n")
        elif now - self.given_at > SAME_NOTICE_S:
            os._exit(PREEMPTED)
