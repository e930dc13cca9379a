"""Stop requests: SIGTERM and SIGUSR1 from Slurm, Kubernetes and torchrun some time before they kill, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

from oreal_megatron.runtime.exit_codes import PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST_S = 5.0  # a scheduler and torchrun, or the terminal and torchrun, may both pass on one request


class StopRequest:
    """The request to stop after the present step, once a signal has arrived. A second signal ends the process."""

    def __init__(self) -> None:
        self.arrived_at: float | None = None

    def __bool__(self) -> bool:
        return self.arrived_at is not None

    def __enter__(self) -> StopRequest:
        """Handle the signals from now on. On the main thread only."""
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the handlers of before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.arrived_at is None:
            self.arrived_at = now
            if os.environ.get("RANK", "0") == "0":  # os.write: the signal may have arrived in the middle of a print
                message = f"oreal: {signal.Signals(number).name} received; finishing the update, then saving"
                os.write(sys.stderr.fileno(), f"{message} (a second signal stops at once)\n".encode())
        elif now - self.arrived_at > SAME_REQUEST_S:
            os._exit(PREEMPTED)
