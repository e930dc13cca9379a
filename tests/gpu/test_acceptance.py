"""The stages of tools/gpu_acceptance.py as tests: `python -m pytest tests/gpu` where a GPU is."""

from __future__ import annotations

import pytest
import torch
from repository import load_tool

acceptance = load_tool("gpu_acceptance")


@pytest.mark.parametrize("stage", acceptance.STAGES)
def test_stage(stage):
    if not torch.cuda.is_available():
        pytest.skip(f"NOT RUN: the stage {stage} needs a GPU, and torch sees none here")
    rows = acceptance.run_alone(stage, acceptance.command_of(stage), acceptance.STAGES[stage][1])
    assert rows and not [row for row in rows if row.result == "FAIL"]
