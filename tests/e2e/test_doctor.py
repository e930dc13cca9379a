"""`oreal doctor` with its real runs: ranks, engine, update and weight sync."""

from __future__ import annotations

from oreal_megatron.doctor import real_run_launcher, real_runs


def test_the_real_runs_go_well_here():
    found = {finding.name: finding for finding in real_run_launcher.launch_real_runs()}
    assert list(found) == [f"run: {part}" for part in real_runs.PARTS]
    assert all(finding.state == "ok" for finding in found.values()), [f.detail for f in found.values()]
    assert "2 ranks on cpu" in found["run: collective"].detail and "verified" in found["run: weight sync"].detail
