"""Check a machine with one GPU, in order of value per minute, and measure what this project claims about GPUs.

    python tools/gpu_acceptance.py [STAGE ...] [--json FILE] [--dry-run]

Prints one table: each value beside its criterion. Exit code 0 if all criteria hold, 1 if one does not, 2 without a GPU.
Every stage has a time limit. `--dry-run` runs the same logic with small shapes on the CPU; speed is then not judged.
Needs torch, Triton and megatron-core; the stage `doctor` needs vLLM too. No network is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_attention import attention
from gpu_engine import checkpoint, sleep, sync
from gpu_kernels import head, kernels, weight_gradient
from gpu_machine import FAILED, NOT_JUDGED, Machine, Row
from gpu_training import training


def doctor(machine: Machine) -> Iterator[Row]:
    """Run `oreal doctor`: a collective, generation, an update and a weight sync with vLLM and Megatron."""
    if machine.dry or importlib.util.find_spec("vllm") is None:
        reason = "dry run" if machine.dry else "vLLM is not installed"
        yield Row("doctor", "oreal doctor", reason, "exit code 0", NOT_JUDGED)
        return
    command = [sys.executable, "-m", "oreal_megatron", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-4000:] + done.stderr[-2000:], file=sys.stderr)
    yield machine.at_most("doctor", "exit code of oreal doctor", done.returncode, 0)


STAGES: dict[str, tuple[Callable[[Machine], Iterator[Row]], int]] = {  # in order of value per minute, with limits in s
    "kernels": (kernels, 240),
    "weight_gradient": (weight_gradient, 60),
    "head": (head, 240),
    "attention": (attention, 180),
    "training": (training, 240),
    "sync": (sync, 60),
    "checkpoint": (checkpoint, 180),
    "sleep": (sleep, 60),
    "doctor": (doctor, 480),
}


def run_stage(name: str, machine: Machine) -> list[Row]:
    """Run one stage within its limit; an error or the limit becomes a row that fails."""
    stage, limit_s = STAGES[name]

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not finished after {limit_s} s")

    rows: list[Row] = []
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit_s)
    try:
        rows.extend(stage(machine))
    except Exception as error:  # the stages after it still tell something
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        rows.append(Row(name, "stage ends", message[:60], "without an error", FAILED))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the stages, print the table, write the JSON; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--json", type=Path, help="write the rows and the machine's name to this file")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU; speed is not judged")
    args = parser.parse_args(arguments)
    for unknown in (name for name in args.stages if name not in STAGES):
        parser.error(f"there is no stage {unknown}; expected some of {', '.join(STAGES)}")
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_acceptance: torch sees no GPU here; run it where one is, or with --dry-run", file=sys.stderr)
        return 2
    machine = Machine(torch.device("cpu" if args.dry_run else "cuda"), args.dry_run)
    card = "CPU, dry run" if args.dry_run else torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}", flush=True)
    rows: list[Row] = []
    for name in args.stages or STAGES:
        for row in run_stage(name, machine):
            rows.append(row)
            print(f"{row.result:10}  {row.stage}: {row.check}: {row.value} (criterion: {row.criterion})", flush=True)
        if args.json:
            result = {"card": card, "torch": torch.__version__, "rows": [dataclasses.asdict(row) for row in rows]}
            args.json.write_text(json.dumps(result, indent=1))
    failed = sum(row.result == FAILED for row in rows)
    print(f"{failed} of {len(rows)} criteria do not hold" if failed else f"no criterion of {len(rows)} is violated")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
