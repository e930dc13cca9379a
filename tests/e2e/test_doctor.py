"""`oreal doctor` with its real runs: ranks, engine, update and weight sync."""

from __future__ import annotations

import contextlib
import tempfile

from oreal_megatron.doctor import real_run_launcher, real_runs


def printed_by_real_runs(folder: str) -> str:
    """Lines of this rank."""
    with tempfile.TemporaryFile("w+") as printed:  # a real file, because vLLM asks for its descriptor
        with contextlib.redirect_stdout(printed):
            real_runs.run(folder)
        printed.seek(0)
        return printed.read()


def test_the_real_runs_go_well_here(in_processes, monkeypatch):
    """In forked processes; tests/faults/test_doctor_runs.py starts those of torchrun."""

    def run(command: list[str], environment: dict[str, str]) -> tuple[str, str]:
        return "".join(in_processes(2, printed_by_real_runs, command[-1], timeout_s=600)), ""

    monkeypatch.setattr(real_run_launcher, "run_with_timeout", run)
    found = {finding.name: finding for finding in real_run_launcher.launch_real_runs()}
    assert list(found) == [f"run: {part}" for part in real_runs.PARTS]
    assert all(finding.state == "ok" for finding in found.values()), [f.detail for f in found.values()]
    assert "2 ranks on cpu" in found["run: collective"].detail and "verified" in found["run: weight sync"].detail
