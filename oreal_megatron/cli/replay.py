"""`oreal replay DUMP`: compute a dumped step again from the checkpoint before it, and compare."""

from __future__ import annotations

import argparse
from pathlib import Path

from oreal_megatron.observe import dumps
from oreal_megatron.observe.metric_comparison import print_comparison
from oreal_megatron.runtime import distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("dump", help="a dumped step, such as RUN/dumps/step_000013")
    parser.add_argument("--resume", metavar="RUN", help="run folder with the checkpoints, if it has been moved")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative difference that counts as none")


def run(args: argparse.Namespace) -> int:
    """Replay the step and print the comparison; return the exit code."""
    dump = dumps.read_replayable(Path(args.dump))

    from oreal_megatron.training.replay import replay_step  # imports Megatron, which takes seconds

    replay = replay_step(dump, args.resume, args.tolerance)
    if distributed.rank() == 0:
        steps = ", ".join(map(str, replay.steps))
        print_comparison(replay.pairs, f"step {dump.step}, from {replay.source}, steps {steps}")
    return 0 if all(pair.same for pair in replay.pairs) else 1
