"""Entry point of `oreal` and of `python -m oreal_megatron`, as which torchrun starts it.

Imports nothing heavy itself: libraries read their environment while they are imported, and Ctrl-C during an import ends
in one line.
"""

from __future__ import annotations

import os
import sys

from oreal_megatron.runtime import logging_setup
from oreal_megatron.runtime.exit_codes import INTERRUPTED


def main() -> int:
    """Run the command line; return its exit code."""
    logging_setup.quiet_environment()
    try:
        from oreal_megatron.cli.main import main as run_command  # imports torch, which takes seconds

        return run_command()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("oreal: interrupted by Ctrl-C", file=sys.stderr, flush=True)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
