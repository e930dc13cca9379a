"""Stage of tools/gpu_acceptance.py: accesses outside of memory, reported by NVIDIA's compute-sanitizer.

As a program of its own it runs every operation once, with the small shapes of a dry run, on the GPU.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu_stages.comparison import run
from gpu_stages.kernels import OPERATIONS, weight_gradient
from gpu_stages.machine import FAILED, NOT_JUDGED, Machine, Row

CHECK = "errors reported by compute-sanitizer"


def memcheck(machine: Machine) -> Iterator[Row]:
    """Run the small cases of all operations in a process under compute-sanitizer's memcheck."""
    program = shutil.which("compute-sanitizer")
    if machine.dry or program is None:
        reason = "dry run" if machine.dry else "compute-sanitizer is not installed"
        yield Row("memcheck", CHECK, reason, "<= 0", NOT_JUDGED)
        return
    # An allocation for each tensor: within a block of torch's cache the sanitizer would not see a tensor's end.
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    command = [program, "--tool", "memcheck", sys.executable, "-m", "gpu_stages.memcheck"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout[-4000:], file=sys.stderr)
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", done.stdout)
    if done.returncode or not errors:
        check = "small cases under compute-sanitizer"
        yield Row("memcheck", check, f"exit code {done.returncode}", "exit code 0 and a summary", FAILED)
    for count in errors[-1:]:
        yield machine.at_most("memcheck", CHECK, int(count), 0)


def run_small_cases(device: torch.device) -> int:
    """Run every case of a dry run once; return how many there were."""
    small, count = Machine(device, dry=True), 0
    for case in itertools.chain.from_iterable(cases(small) for cases in OPERATIONS.values()):
        run(small, case.fused, case.inputs, case.leaves)
        count += 1
    list(weight_gradient(small))
    return count


if __name__ == "__main__":
    print(f"{run_small_cases(torch.device('cuda'))} small cases")
