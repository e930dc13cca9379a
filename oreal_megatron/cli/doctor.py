"""`oreal doctor [RECIPE]`: is this machine ready? Ends with a table, and code 1 when something must be mended."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from oreal_megatron import settings
from oreal_megatron.config import ConfigError
from oreal_megatron.doctor import checks, real_runs
from oreal_megatron.doctor.checks import ABSENT, FAILED, OK, WARNING, Finding

COLOURS = {OK: "green", WARNING: "yellow", FAILED: "bold red", ABSENT: "dim"}
RUNS_LIMIT_S = 300
LEAVE_S = 60  # torchrun gives its processes half of it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="path/to/file.py:function; its model, data, disk and judges as well")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. model.path=FOLDER")
    parser.add_argument("--quick", action="store_true", help="skip the real runs, which take half a minute")


def run(args: argparse.Namespace) -> int:
    found = list(look(args))
    show(found)
    failed = sum(finding.state == FAILED for finding in found)
    print(f"{failed} of {len(found)} checks failed" if failed else f"{len(found)} checks, none failed")
    return 1 if failed else 0


def look(args: argparse.Namespace) -> Iterator[Finding]:
    yield from checks.software()
    config = None
    if args.recipe:
        try:
            config = settings.load(args.recipe, args.set)
        except ConfigError as error:
            yield Finding("recipe", FAILED, str(error))
    yield from checks.machine(Path(config.run if config else "."))
    if config:
        # The layout is checked against the world that the recipe was made for, not against this one process, nor
        # against the number of pods, which Kubeflow puts there.
        os.environ["WORLD_SIZE"] = str(config.gpus or 1)
        yield from checks.inputs(config)
        yield from checks.judges(config.verify.judge)
    if not args.quick:
        yield from run_real_parts()


def run_real_parts() -> Iterator[Finding]:
    """The parts of doctor_runs.py, on all GPUs or in two processes; what did not report has failed."""
    processes = torch.cuda.device_count() or 2
    print(f"real runs in {processes} processes, half a minute ...", file=sys.stderr, flush=True)
    # Without what a scheduler set for its own: with PET_NNODES=4 torchrun would wait for three more machines.
    others = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in others and not key.startswith("PET_")}
    with tempfile.TemporaryDirectory() as folder:
        real_runs.make_model(Path(folder))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*torchrun, "-m", real_runs.__name__, folder]
        output, errors = _run(command, environment)
    lines = [line.removeprefix(real_runs.DONE) for line in output.splitlines() if line.startswith(real_runs.DONE)]
    went_well = dict(line.split(": ", 1) for line in lines)
    for name in real_runs.PARTS:
        if name in went_well:
            yield Finding(f"run: {name}", OK, went_well[name])
        else:
            yield Finding(f"run: {name}", FAILED, reason(errors), MEND[name])
            return


def _run(command: list[str], environment: dict[str, str]) -> tuple[str, str]:
    """Output and errors; what hangs is ended, the errors then hold its last lines."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        return process.communicate(timeout=RUNS_LIMIT_S)
    except subprocess.TimeoutExpired as late:
        output, errors = ((text or b"").decode(errors="replace") for text in (late.stdout, late.stderr))
    process.terminate()  # torchrun ends its processes then; killed, it would leave them on the GPUs
    try:
        process.communicate(timeout=LEAVE_S)
    except subprocess.TimeoutExpired:
        process.kill()
    return output, f"not done after {RUNS_LIMIT_S} s; its last words: " + " | ".join(errors.strip().splitlines()[-3:])


MEND = {
    "collective": "ranks do not reach each other: NCCL_DEBUG=INFO shows why; name the network (NCCL_SOCKET_IFNAME)",
    "generate": "the engine does not work alone either? `vllm serve` with any small model says more",
    "train": "Megatron-core's or the kernels' fault; the last lines of the message name the call",
    "weight sync": "weights do not reach the engine; --set engine.transport=gather goes through vLLM's own loader",
}


def reason(errors: str) -> str:
    """The first error among what all ranks wrote, which is the cause of the others."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    causes = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Differ", "Stopped"))]
    return next(iter(causes), lines[-1] if lines else "ended without a word")


def show(found: list[Finding]) -> None:
    table = Table()
    for column in ("check", "state", "found", "to mend it"):
        table.add_column(column, overflow="fold")
    for finding in found:
        state = f"[{COLOURS[finding.state]}]{finding.state}[/]"
        table.add_row(finding.name, state, escape(finding.found), escape(finding.mend))
    Console(width=None if sys.stdout.isatty() else 150).print(table)
