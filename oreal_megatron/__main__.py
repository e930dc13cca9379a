"""Entry point of `oreal` and of `python -m oreal_megatron`, as which torchrun starts it.

Imports next to nothing itself: libraries read their environment while they are imported, and Ctrl-C during an import
ends in one line.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from oreal_megatron.runtime.exit_codes import INTERRUPTED

_interrupts: list[int] = []  # signals that arrived while no command handled them


def main() -> int:
    """Run the command line; return its exit code."""
    signal.signal(signal.SIGINT, _interrupt)  # before all other imports, which a busy machine may take seconds for
    try:
        from oreal_megatron.runtime import logging_setup

        logging_setup.quiet_environment()
        from oreal_megatron.cli.main import main as run_command  # imports torch, which takes seconds

        return run_command()
    except (KeyboardInterrupt, Exception):
        if not _interrupts:
            raise
        if os.environ.get("RANK", "0") == "0":
            print("oreal: interrupted by Ctrl-C", file=sys.stderr, flush=True)
        return INTERRUPTED


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt and remember it: an interrupted import of numpy or torch ends in another error."""
    _interrupts.append(number)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
