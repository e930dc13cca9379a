"""The grading process: what it imports."""

import subprocess
import sys

HEAVY = {"torch", "sympy", "numpy", "httpx"}


def test_a_worker_starts_light():
    """Neither torch nor sympy: a worker starts within a fraction of a second and stays small."""
    code = f"import sys, oreal_megatron.verify.worker_process; print(sorted({HEAVY} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
