"""The declared dependencies, and what they require in turn, are enough to train and to save a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import make_addition_task
import pytest
import small_model
from declared_packages import provided_by, providers, required_distributions

# Python imports a module of this name at its start, in every process. It hides packages as if they were not installed.
SITECUSTOMIZE = """
import importlib.machinery, json, pathlib

HIDDEN = set(json.loads(pathlib.Path(__file__).with_name("hidden.json").read_text()))
find_spec = importlib.machinery.PathFinder.find_spec

def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in HIDDEN else find_spec(name, path, target)

importlib.machinery.PathFinder.find_spec = find_others
"""
RECIPE = """
from oreal_megatron.config import *

def sft():
    return Config(
        run="{folder}/sft",
        tokens_per_micro_batch=512,
        model=ModelConfig("{folder}/start"),
        engine=EngineConfig(max_model_len=32),
        supervised=SupervisedConfig(
            path="{folder}/demonstrations.jsonl",
            steps=2,
            samples_per_step=20,
            optimizer=OptimizerConfig(warmup_steps=1),
        ),
    )
"""


def undeclared_packages() -> list[str]:
    """Return the installed top-level packages that no required distribution provides."""
    required = required_distributions() | {"oreal-megatron"}
    return [package for package in providers() if not provided_by(package, required)]


@pytest.mark.full
def test_supervised_training_saves_with_nothing_but_the_declared_dependencies(tmp_path):
    small_model.make_model(tmp_path / "start", seed=0, layers=1)
    make_addition_task.make_problems(tmp_path, 0, training=10, held_out=10, demonstrations=60, below=30)
    (tmp_path / "recipes.py").write_text(RECIPE.format(folder=tmp_path))
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(SITECUSTOMIZE)
    (tmp_path / "hook/hidden.json").write_text(json.dumps(undeclared_packages()))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}/hook:{os.environ.get('PYTHONPATH', '')}"}

    def python(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)

    assert "No module named 'vllm'" in python("-c", "import vllm").stderr, "it is of the extra `gpu`"
    result = python("-m", "oreal_megatron", "--processes", "1", "sft", f"{tmp_path}/recipes.py:sft")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert Path(tmp_path, "sft/checkpoints/step_000002").is_dir()
