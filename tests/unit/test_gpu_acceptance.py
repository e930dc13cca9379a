"""The logic of tools/gpu_acceptance.py without a GPU: a dry run, wrong results, errors, time limits, exit codes."""

from __future__ import annotations

import json
import os
import sys
import time
from unittest import mock

import pytest
import torch
from repository import load_tool

acceptance = load_tool("gpu_acceptance")
gpu_machine, gpu_kernels = (sys.modules[name] for name in ("gpu_machine", "gpu_kernels"))  # as the tool imported them


@pytest.fixture(autouse=True)
def environment():
    """The stage `training` is a job of one process, and leaves its variables."""
    with mock.patch.dict(os.environ):
        yield


def test_a_dry_run_reaches_every_stage_and_judges_results_but_no_speed(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert acceptance.main(["--dry-run", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    rows = written["rows"]
    assert written["card"] == "CPU, dry run" and {row["stage"] for row in rows} == set(acceptance.STAGES)
    assert not any(row["result"] == gpu_machine.PASSED for row in rows if "share of copy" in row["check"])
    assert sum(row["result"] == gpu_machine.PASSED for row in rows) >= 11
    assert "criterion: <= " in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["label", "nan", "second run"])
def test_a_wrong_kernel_fails(fault, monkeypatch, capsys):
    original, calls = gpu_kernels.logprob_from_logits, []

    def wrong(logits, labels):
        logp, entropy = original(logits, labels)
        calls.append(1)
        if fault == "label":
            return logp * 1.001, entropy
        if fault == "nan":
            return logp * torch.where(labels == 0, torch.nan, 1.0), entropy
        return logp * (1 + 1e-7 * (len(calls) % 2)), entropy

    monkeypatch.setattr(gpu_kernels, "logprob_from_logits", wrong)
    assert acceptance.main(["--dry-run", "kernels"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_slow_or_failing_stage_is_a_failure_and_the_next_still_runs(monkeypatch, capsys):
    def hang(machine):
        time.sleep(30)
        yield

    def broken(machine):
        raise ValueError("no such kernel")
        yield

    monkeypatch.setitem(acceptance.STAGES, "kernels", (hang, 1))
    monkeypatch.setitem(acceptance.STAGES, "head", (broken, 1))
    assert acceptance.main(["--dry-run", "kernels", "head", "weight_gradient"]) == 1
    shown = capsys.readouterr().out
    assert "TimeoutError: not finished after 1 s" in shown and "ValueError: no such kernel" in shown
    assert "weight_gradient: relative error" in shown and "2 of 3 criteria do not hold" in shown


def test_a_speed_below_its_criterion_fails_on_a_gpu_only():
    gpu, dry = (acceptance.Machine(torch.device("cpu"), dry=dry) for dry in (False, True))
    assert gpu.at_least("s", "c", 299, 300).result == gpu_machine.FAILED
    assert gpu.at_most("s", "c", 1.11, 1.10, speed=True).result == gpu_machine.FAILED
    assert dry.at_least("s", "c", 299, 300).result == gpu_machine.NOT_JUDGED
    assert dry.at_most("s", "c", 1.11, 1.10).result == gpu_machine.FAILED, "an error counts anywhere"


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert acceptance.main([]) == 2 and "sees no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        acceptance.main(["--dry-run", "heads"])
    assert ended.value.code == 2 and "there is no stage heads" in capsys.readouterr().err
