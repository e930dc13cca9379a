"""Real runs of `oreal doctor` that crash or hang: each is reported and leaves no process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from oreal_megatron.doctor import real_run_launcher
from oreal_megatron.doctor.checks import FAILED, OK


def test_a_crash_of_a_real_run_is_reported_with_the_part_it_was_in(tmp_path, monkeypatch):
    """An engine that ends its process without a word."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("PET_NNODES", "4")  # as Kubeflow sets it; the runs are of this machine alone
    monkeypatch.setattr(real_run_launcher, "TIMEOUT_S", 250)
    found = list(real_run_launcher.launch_real_runs(processes=1))
    assert [(one.name, one.state) for one in found] == [("run: collective", OK), ("run: generate", FAILED)]
    assert "vllm" in found[1].fix and "vllm" not in sys.modules


HANGS = """
import os, pathlib, sys, time
pathlib.Path(__file__).with_name(f"{os.getpid()}.pid").touch()
print("started", flush=True)
print("waiting for nobody", file=sys.stderr, flush=True)
time.sleep(300)
"""


def test_a_real_run_that_hangs_is_ended_with_its_processes(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.setattr(real_run_launcher, "TIMEOUT_S", 40)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output, errors = real_run_launcher.run_with_timeout([*torchrun, str(tmp_path / "hangs.py")], dict(os.environ))
    assert "started" in output and "waiting for nobody" in errors
    pids = [file.stem for file in tmp_path.glob("*.pid")]
    assert len(pids) == 2 and not any(Path("/proc", pid).exists() for pid in pids)
