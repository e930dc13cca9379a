"""Every Triton kernel compiled for A100, H100 and B200 without a GPU: registers, spills and instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Rows of tools/compile_kernels.py's table, in a process that does not interpret."""
    out = tmp_path_factory.mktemp("compiled") / "kernels.json"
    command = [sys.executable, str(ROOT / "tools/compile_kernels.py"), "--json", str(out)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout


def test_no_kernel_spills_or_wants_too_much_shared_memory(compiled, capsys):
    rows, table = compiled
    with capsys.disabled():
        print("\n" + table)
    assert {row["architecture"] for row in rows} == {80, 90, 100}
    for row in rows:
        assert not row["spill_bytes"] and row["shared"] <= (163 if row["architecture"] == 80 else 227) * 1024, row


def test_passes_over_logits_load_sixteen_bytes_at_a_time(compiled):
    passes = [row for row in compiled[0] if row["kernel"].startswith(("statistics", "gradient"))]
    assert len(passes) == 18
    for row in passes:
        assert row["instructions"].get("LDG.E.128"), row


def test_the_product_runs_on_tensor_cores(compiled):
    for row in compiled[0]:
        if row["kernel"].startswith("linear statistics"):
            assert row["instructions"].get(TENSOR_CORES[row["architecture"]]), row


def test_a_fault_is_reported():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from compile_kernels import faults
    finally:
        sys.path.pop(0)
    good = {"kernel": "x", "architecture": 90, "shared": 0, "spill_bytes": 0}
    assert not faults([good])
    assert "wants 300000 bytes" in faults([good | {"shared": 300000}])[0]
    assert "spills 8 bytes" in faults([good | {"spill_bytes": 8}])[0]
