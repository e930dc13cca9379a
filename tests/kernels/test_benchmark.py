"""tools/benchmark_kernels.py on tiny shapes: its results are complete and ordered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "kernels/benchmarks"))
import loss_providers  # noqa: E402


def test_benchmark_writes_its_table_and_picture(tmp_path):
    command = [sys.executable, str(ROOT / "tools/benchmark_kernels.py"), "--device", "cpu", "--rounds", "2"]
    command += ["--shapes", "64x32x5000", "--sequences", "3x50", "--out", str(tmp_path)]
    command += ["--only", "naive,chunks,linear_,loop,plain,token_", "--dtypes", "bfloat16", "float32"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["op"], row["dtype"], row["provider"]): row for row in results["rows"]}
    heads = {provider for op, dtype, provider in rows if op == "head" and dtype == "bfloat16"}
    assert {"bare GEMMs", "naive torch", "linear_logprob save", "linear_oreal_loss"} <= heads
    assert {"loop over sequences", "token_weights + oreal_loss"} <= {name for op, _, name in rows if op == "loss"}
    for (op, _, provider), row in rows.items():
        assert 0 < row["total_ms"]["p20"] <= row["total_ms"]["p50"] <= row["total_ms"]["p80"]
        assert row["shape"] == ("64 x 32 x 5000" if op == "head" else "3 x 50") and row["ratio"] > 0
        if provider not in ("bare GEMMs", "copy of its bytes"):
            assert row["extra_peak_bytes"] >= 0 and row["forward_ms"] and row["backward_ms"]
    assert "torch" in results["versions"] and results["command"].startswith("python ")
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert "linear_oreal_loss" in done.stdout


def test_all_providers_of_the_loss_compute_the_same():
    case, results = loss_providers.LossProviders(6, 50, "cpu"), {}
    for name, forward in case.providers(""):
        loss = forward()
        loss.backward()
        results[name] = loss.detach(), case.leaf.grad
    expected = results.pop("plain torch")
    assert set(results) == {"loop over sequences", "token_weights + oreal_loss"}
    for values in results.values():
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-7)
