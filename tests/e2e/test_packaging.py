"""The wheel's content, imports from any folder, and the command where no GPU library is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from repository import ROOT


def output(*words: str, folder: Path) -> str:
    """Standard output of a Python command that must succeed."""
    result = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_kernels_folder_shadows_nothing():
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec and spec.origin)"
    assert output("-c", code, folder=ROOT).strip() == "None", "at most a namespace without a file, no package of ours"


def test_both_packages_come_from_this_checkout_from_any_folder(tmp_path):
    code = "import oreal_megatron, oreal_kernels; print(oreal_megatron.__file__, oreal_kernels.__file__)"
    assert output("-c", code, folder=tmp_path).split() == [
        str(ROOT / "oreal_megatron/__init__.py"),
        str(ROOT / "kernels/oreal_kernels/__init__.py"),
    ]


OWN_REWARD = """
import json, oreal_megatron, sys
from oreal_megatron import settings
from oreal_megatron.config.user_functions import check_functions
from oreal_megatron.verify.grader import Grader

config = settings.from_recipe(sys.argv[1] + ":own_reward")
check_functions(config)
row = json.dumps({"domain": "words", "words": ["a"]})
with Grader(config.verify) as grader:
    outcomes = [grader.submit("", text, row=row).result(60).outcome.value for text in ("a b", "b")]
print(oreal_megatron.__file__, outcomes)
"""


def test_a_wheel_contains_exactly_the_two_packages_and_runs_the_extension_example(tmp_path):
    source = tmp_path / "source"  # a copy, because setuptools leaves a build folder and takes old files from one
    for name in ("oreal_megatron", "kernels", "tests", "tools", "examples", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, source)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*wheel, "-w", tmp_path, source], check=True, capture_output=True)
    archive = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"oreal_megatron", "oreal_kernels"}
    assert {"oreal_megatron/mcore/scorer.py", "oreal_kernels/hidden_to_logprob.py"} <= {*names}
    assert {"oreal_megatron/py.typed", "oreal_kernels/py.typed"} <= {*names}
    assert {"oreal_megatron/observe/page/page.css", "oreal_megatron/observe/page/viewer.js"} <= {*names}
    archive.extractall(tmp_path / "installed")
    recipe = shutil.copy(ROOT / "examples/recipes/own_reward.py", tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", OWN_REWARD, recipe]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout.split(" ", 1) == [
        str(tmp_path / "installed/oreal_megatron/__init__.py"),
        "['correct', 'incorrect']\n",
    ], result.stderr


def test_the_command_lists_its_subcommands(tmp_path):
    text = output("-m", "oreal_megatron", "--help", folder=tmp_path)
    assert all(word in text for word in ("train", "sft", "evaluate"))
