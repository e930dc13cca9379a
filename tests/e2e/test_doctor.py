"""`oreal doctor` with its real runs: ranks, engine, update and hand-over."""

from __future__ import annotations

from oreal_megatron.cli import doctor
from oreal_megatron.doctor import real_runs


def test_the_real_runs_go_well_here():
    found = {finding.name: finding for finding in doctor.run_real_parts()}
    assert list(found) == [f"run: {part}" for part in real_runs.PARTS]
    assert all(finding.state == "ok" for finding in found.values()), [f.found for f in found.values()]
    assert "2 ranks on cpu" in found["run: collective"].found and "arrived" in found["run: weight sync"].found
