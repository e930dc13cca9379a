"""Check a machine with one GPU, in order of value per minute, and measure what this project claims about GPUs.

    python tools/gpu_acceptance.py [STAGE ...] [--json FILE] [--dry-run]

Prints one table: each value beside its criterion. Exit code 0 if all criteria hold, 1 if one does not, 2 without a GPU.
Every stage runs in a process of its own, which is ended at the stage's limit with all that it started. `--dry-run`
runs the same logic with small shapes on the CPU, in one process; speed is then not judged. Needs torch, Triton,
megatron-core and psutil; `sleep`, `doctor`, `learning` and `steps` need vLLM too. No network is used.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_stages.attention import attention
from gpu_stages.commands import doctor, learning, steps
from gpu_stages.engine import checkpoint, sync
from gpu_stages.head import head
from gpu_stages.kernels import kernels, weight_gradient
from gpu_stages.machine import FAILED, Machine, Row
from gpu_stages.memcheck import memcheck
from gpu_stages.rivals import rivals
from gpu_stages.sleep import sleep
from gpu_stages.training import training

TERMINATION_S = 40  # torchrun gives its processes 30
STAGES: dict[str, tuple[Callable[[Machine], Iterator[Row]], int]] = {  # in order of value per minute, with limits in s
    "kernels": (kernels, 300),
    "weight_gradient": (weight_gradient, 60),
    "head": (head, 240),
    "attention": (attention, 180),
    "training": (training, 240),
    "sync": (sync, 60),
    "checkpoint": (checkpoint, 180),
    "sleep": (sleep, 60),
    "memcheck": (memcheck, 300),
    "rivals": (rivals, 300),
    "doctor": (doctor, 480),
    "learning": (learning, 480),
    "steps": (steps, 360),
}


def run_stage(name: str, machine: Machine) -> Iterator[Row]:
    """Run one stage in this process; an error becomes a row that fails."""
    try:
        yield from STAGES[name][0](machine)
    except Exception as error:  # the stages after it still tell something
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        yield Row(name, "stage ends", message[:60], "without an error", FAILED)


def run_alone(name: str, command: list[str], limit_s: float) -> list[Row]:
    """Run one stage by a command that writes a JSON object for each row to the file named after it.

    A command that exceeds the limit, or dies, adds a row that fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.touch()
        end = end_within(subprocess.Popen([*command, str(file)]), limit_s)
        rows = [Row(**json.loads(line)) for line in file.read_text().splitlines()]
    if end:
        rows.append(Row(name, "stage ends", end, "without an error", FAILED))
        show(rows[-1])
    return rows


def end_within(process: subprocess.Popen[bytes], limit_s: float) -> str:
    """Wait for a process; return "" or why it failed. At the limit, end it with all that it started.

    The descendants are looked up: torchrun gives its workers sessions of their own, which no signal to a group reaches.
    """
    try:
        code = process.wait(limit_s)
        return f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for running in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            running.terminate()
    _, alive = psutil.wait_procs(started, timeout=TERMINATION_S)
    for running in alive:
        running.kill()
    process.wait()
    return f"not finished after {limit_s} s"


def show(row: Row) -> None:
    """Print a row."""
    print(f"{row.result:10}  {row.stage}: {row.check}: {row.value} (criterion: {row.criterion})", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the stages, print the table, write the JSON; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--json", type=Path, help="write the rows and the machine's name to this file")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU; speed is not judged")
    parser.add_argument("--append-rows", type=Path, help=argparse.SUPPRESS)  # of the process of one stage
    args = parser.parse_args(arguments)
    for unknown in (name for name in args.stages if name not in STAGES):
        parser.error(f"there is no stage {unknown}; expected some of {', '.join(STAGES)}")
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_acceptance: torch sees no GPU here; run it where one is, or with --dry-run", file=sys.stderr)
        return 2
    machine = Machine(torch.device("cpu" if args.dry_run else "cuda"), args.dry_run)
    names = args.stages or list(STAGES)
    if args.append_rows:
        append_rows(names[0], machine, args.append_rows)
        return 0
    card = "CPU, dry run" if args.dry_run else card_name()
    print(f"{card}, torch {torch.__version__}", flush=True)
    rows: list[Row] = []
    for name in names:
        rows += dry_rows(name, machine) if args.dry_run else run_alone(name, command_of(name), STAGES[name][1])
        if args.json:
            result = {"card": card, "torch": torch.__version__, "rows": [dataclasses.asdict(row) for row in rows]}
            args.json.write_text(json.dumps(result, indent=1))
    failed = sum(row.result == FAILED for row in rows)
    print(f"{failed} of {len(rows)} criteria do not hold" if failed else f"no criterion of {len(rows)} is violated")
    return int(failed > 0)


def card_name() -> str:
    """Return the GPU's name, asked for by another process: a CUDA context here would take memory from the stages."""
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


def command_of(name: str, *options: str) -> list[str]:
    """Return the command of one stage's process, without the file of its rows."""
    return [sys.executable, __file__, name, *options, "--append-rows"]


def append_rows(name: str, machine: Machine, file: Path) -> None:
    """Run one stage, and print and write its rows one by one: a limit keeps those before it."""
    with file.open("a") as lines:
        for row in run_stage(name, machine):
            show(row)
            print(json.dumps(dataclasses.asdict(row)), file=lines, flush=True)


def dry_rows(name: str, machine: Machine) -> list[Row]:
    """Run one stage in this process and print its rows."""
    rows = list(run_stage(name, machine))
    for row in rows:
        show(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
