"""Every Triton kernel compiled for an H100 without a GPU, and with --full for A100 and B200: registers, spills and
instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oreal_megatron.runtime import versions

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(
    scope="module",
    params=["90", pytest.param("80", marks=pytest.mark.full), pytest.param("100", marks=pytest.mark.full)],
)
def compiled(request, tmp_path_factory):
    """Rows of tools/compile_kernels.py's table for an architecture, in a process that does not interpret."""
    out = tmp_path_factory.mktemp("compiled") / "kernels.json"
    command = [sys.executable, str(ROOT / "tools/compile_kernels.py"), "--json", str(out)]
    command += ["--architectures", request.param]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout


def test_no_kernel_spills_or_wants_too_much_shared_memory(compiled, capsys):
    rows, table = compiled
    with capsys.disabled():
        print("\n" + table)
    assert len({row["kernel"] for row in rows}) == len(rows) > 10
    for row in rows:
        assert not row["spill_bytes"] and row["shared"] <= 163 * 1024, row  # what a block of the A100 may have


def test_passes_over_logits_load_sixteen_bytes_at_a_time(compiled):
    passes = [row for row in compiled[0] if row["kernel"].startswith(("statistics", "gradient"))]
    assert len(passes) == 7
    for row in passes:
        assert row["instructions"].get("LDG.E.128"), row


MOST_INSTRUCTIONS = {  # per logit in the main loop; of 2 bytes read, an H100 can issue about 11 at its memory's speed
    "gradient bf16": 10,
    "gradient fp32 to bf16": 9,
    "gradient bf16 with entropy": 18,
    "gradient bf16 capped": 34,
    "statistics bf16": 14,
    "statistics fp32": 14,
    "statistics bf16 capped": 33,
}


def test_passes_over_logits_issue_few_instructions_and_never_wait_in_their_loop(compiled):
    """Entropy and label outside of the loop: 9 instructions a logit instead of 35, and no barrier per block."""
    assert_loops_are_short(compiled[0], 1)


def assert_loops_are_short(rows: list[dict], architectures: int) -> None:
    passes = [row for row in rows if "per_element" in row]
    assert len(passes) == architectures * len(MOST_INSTRUCTIONS)
    for row in passes:
        assert 0 < row["per_element"] <= MOST_INSTRUCTIONS[row["kernel"]] and not row["barriers_in_loop"], row
        assert row["registers"] <= 96, row


@pytest.mark.full
@pytest.mark.parametrize("release", sorted(set(versions.TRITON_OF_TORCH.values())))
def test_every_triton_that_a_supported_torch_brings_compiles_the_kernels(release, tmp_path):
    """Installed into a folder of its own, in front of this environment's."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "triton")]
    installed = subprocess.run([*pip, f"triton=={release}"], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"kernels not compiled with triton {release}, which pip cannot install: {installed.stderr}")
    paths = os.pathsep.join([str(tmp_path / "triton"), *sys.path[1:], os.environ.get("PYTHONPATH", "")])
    out = tmp_path / "kernels.json"
    command = [sys.executable, str(ROOT / "tools/compile_kernels.py"), "--json", str(out)]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"Triton {release}, compiled" in done.stdout, done.stdout + done.stderr
    assert_loops_are_short(json.loads(out.read_text()), 3)


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
