"""The logic of tools/gpu_acceptance.py without a GPU: a dry run, wrong results, errors, time limits, exit codes."""

from __future__ import annotations

import json
import os
import sys
from unittest import mock

import oreal_kernels
import psutil
import pytest
import torch
from gpu_stages import kernels
from gpu_stages.machine import FAILED, NOT_JUDGED, PASSED, Machine
from repository import load_tool

acceptance = load_tool("gpu_acceptance")

WHOLE_COMMANDS = ("doctor", "learning", "steps")  # a minute each, with vLLM


@pytest.fixture(autouse=True)
def environment():
    """The stage `training` is a job of one process, and leaves its variables."""
    with mock.patch.dict(os.environ):
        yield


def test_a_dry_run_reaches_every_stage_and_judges_results_but_no_speed(tmp_path, capsys):
    file = tmp_path / "rows.json"
    stages = [stage for stage in acceptance.STAGES if stage not in WHOLE_COMMANDS]
    assert acceptance.main(["--dry-run", "--json", str(file), *stages]) == 0
    written = json.loads(file.read_text())
    rows = written["rows"]
    assert written["card"] == "CPU, dry run" and {row["stage"] for row in rows} == set(stages)
    assert not any(row["result"] == PASSED for row in rows if "share of copy" in row["check"])
    judged = {row["stage"] for row in rows if row["result"] == PASSED}
    assert judged >= {"kernels", "weight_gradient", "attention", "training", "sync", "checkpoint", "sleep"}
    assert "criterion: <= " in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.parametrize("stage", WHOLE_COMMANDS)
def test_a_dry_run_of_whole_commands_ends_without_an_error(stage):
    machine = Machine(torch.device("cpu"), dry=True)
    rows = list(acceptance.run_stage(stage, machine))
    assert rows and not [row for row in rows if row.result == FAILED]
    assert not [row for row in rows if "not installed" in row.value or "nan" in row.value]


def test_a_wrong_operation_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "OPERATIONS", {"rotary": kernels.OPERATIONS["rotary"]})
    assert acceptance.main(["--dry-run", "kernels"]) == 0
    monkeypatch.setattr(oreal_kernels, "rotary", lambda x, cos_sin: x * 1.0)
    assert acceptance.main(["--dry-run", "kernels"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_failing_stage_is_a_failure_and_the_next_still_runs(monkeypatch, capsys):
    def broken(machine):
        raise ValueError("no such kernel")
        yield

    monkeypatch.setitem(acceptance.STAGES, "head", (broken, 1))
    assert acceptance.main(["--dry-run", "head", "weight_gradient"]) == 1
    shown = capsys.readouterr().out
    assert "ValueError: no such kernel" in shown
    assert "weight_gradient: relative error" in shown and "1 of 2 criteria do not hold" in shown


def test_a_stage_in_its_own_process_gives_the_same_rows():
    alone = acceptance.run_alone("weight_gradient", acceptance.command_of("weight_gradient", "--dry-run"), 60)
    assert alone and alone == acceptance.dry_rows("weight_gradient", Machine(torch.device("cpu"), True))


ROW = """
import json, os, subprocess, sys, time
row = dict(stage="s", check="c", value="1", criterion="2", result="pass")
open(sys.argv[1], "a").write(json.dumps(row) + "\\n")
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"


@pytest.mark.parametrize("end", ["os.abort()", "time.sleep(60)"])
def test_a_stage_that_dies_or_hangs_keeps_its_rows_and_leaves_no_process(end, tmp_path, monkeypatch):
    """The workers of torchrun have sessions of their own, and a blocked one ignores SIGTERM."""
    monkeypatch.setattr(acceptance, "TERMINATION_S", 0.5)
    worker = f"""
process = subprocess.Popen([sys.executable, "-c", {DEAF!r}], start_new_session=True, stdout=subprocess.PIPE)
process.stdout.read(1)
open({str(tmp_path / "pid")!r}, "w").write(str(process.pid))
"""
    script = ROW + ("" if "abort" in end else worker) + end
    rows = acceptance.run_alone("s", [sys.executable, "-c", script], 5)
    assert [row.result for row in rows] == [PASSED, FAILED]
    assert rows[1].value == ("exit code -6" if "abort" in end else "not finished after 5 s")
    if "abort" not in end:
        pid = int((tmp_path / "pid").read_text())
        assert pid not in [process.pid for process in psutil.process_iter() if process.status() != psutil.STATUS_ZOMBIE]


def test_a_speed_below_its_criterion_fails_on_a_gpu_only():
    gpu, dry = (acceptance.Machine(torch.device("cpu"), dry=dry) for dry in (False, True))
    assert gpu.at_least("s", "c", 299, 300).result == FAILED
    assert gpu.at_most("s", "c", 1.11, 1.10, speed=True).result == FAILED
    assert dry.at_least("s", "c", 299, 300).result == NOT_JUDGED
    assert dry.at_most("s", "c", 1.11, 1.10).result == FAILED, "an error counts anywhere"


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert acceptance.main([]) == 2 and "sees no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        acceptance.main(["--dry-run", "heads"])
    assert ended.value.code == 2 and "there is no stage heads" in capsys.readouterr().err
