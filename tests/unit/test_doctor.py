"""The checks of `oreal doctor`, one by one."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import time
from pathlib import Path

import pytest

from oreal_megatron.cli import main
from oreal_megatron.config import CheckpointConfig, Config, RewardModelConfig
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.doctor import checks, real_run_launcher
from oreal_megatron.doctor.checks import ABSENT, FAILED, OK, WARNING
from oreal_megatron.models import architecture
from oreal_megatron.runtime import versions


def states(findings) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


@pytest.mark.parametrize(
    ("inside", "state", "says"),
    [
        ("models.py", FAILED, "unrelated package"),  # PyPI's apex is a web library
        ("multi_tensor_apply", OK, "NVIDIA's"),
        (None, ABSENT, "not installed"),
    ],
)
def test_pypis_apex_is_not_taken_for_nvidias(inside, state, says, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    if inside:
        (tmp_path / "apex").mkdir()
        (tmp_path / "apex/__init__.py").write_text("raise ImportError('not to be imported')")
        (tmp_path / "apex" / inside).mkdir()
    importlib.invalidate_caches()
    finding = checks.apex()
    assert finding.state == state and says in finding.detail
    assert ("pip uninstall apex" in finding.fix) == (state == FAILED)


def test_this_environment_is_sound_and_an_unsupported_release_is_not(monkeypatch):
    found = states(checks.software())
    assert all(found[name] == OK for name in ("Python", "torch", "Megatron-core", "vLLM", "Triton"))
    monkeypatch.setattr(versions, "MEGATRON", {"megatron-core": ("0.18", "0.19")})
    finding = next(one for one in checks.software() if one.name == "Megatron-core")
    assert finding.state == FAILED and finding.fix == "pip install 'megatron-core>=0.18,<0.19'"


def test_every_package_is_compared_with_what_setup_asks_for(monkeypatch):
    setup = (Path(__file__).parent.parent.parent / "pyproject.toml").read_text()
    assert all(f'"{name}>={first}"' in setup for name, first in versions.AT_LEAST.items())
    first, stop = versions.VLLM["vllm"]
    assert f'"vllm>={first},<{stop}"' in setup and f'"megatron-core=={versions.MEGATRON["megatron-core"][0]}"' in setup
    monkeypatch.setattr(versions, "AT_LEAST", dict.fromkeys(versions.AT_LEAST, "99"))
    found = states(checks.software())
    assert all(found[name] == FAILED for name in ("torch", "Triton", "transformers"))


def test_a_machine_that_will_not_do_is_told(tmp_path, monkeypatch):
    assert states(checks.machine(Path("/proc/runs")))["run folder"] == FAILED  # where nobody can write
    now = time.time()
    monkeypatch.setattr(checks.time, "time", lambda: now + 60)
    small = shutil.disk_usage("/")._replace(total=64 * 2**20)  # a container's
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: small)
    assert states(checks.machine(tmp_path)) == {"shared memory": WARNING, "clock": WARNING}


def test_host_memory_is_compared_with_the_plan(model_folder, monkeypatch):
    arch = architecture.read(HFFolder(str(model_folder)).config)
    config = Config(gpus=8)
    assert checks.host_memory(config, arch).state == OK
    monkeypatch.setattr(
        checks.memory,
        "host_bytes",
        lambda scenario: {"idle models": 1e15, "gathering a checkpoint": 0.0, "loading a checkpoint": 0.0},
    )
    assert checks.host_memory(config, arch).state == FAILED


def test_room_for_the_checkpoints_is_asked_for(model_folder, tmp_path, monkeypatch):
    config = Config(run=str(tmp_path), checkpoint=CheckpointConfig(keep=2))
    assert "3 more checkpoints" in checks.disk(config, model_folder).detail
    for step in (10, 20):
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
    resumed = checks.disk(config, model_folder)
    assert resumed.state == OK and "1 more checkpoints" in resumed.detail
    greedy = checks.disk(dataclasses.replace(config, checkpoint=CheckpointConfig(keep=10**9)), model_folder)
    assert greedy.state == FAILED and "checkpoint.keep" in greedy.fix
    weights = checks.weight_bytes(model_folder)
    room = shutil.disk_usage(tmp_path)._replace(free=8 * weights + weights)  # one checkpoint, not best/ and policy/
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: room)
    assert checks.disk(config, model_folder).state == FAILED
    weights = (model_folder / "model.safetensors").stat().st_size
    alone = dataclasses.replace(config, reward_model=RewardModelConfig(enabled=False))
    assert checks.checkpoint_bytes(config, model_folder) == 2 * 4 * weights
    assert checks.checkpoint_bytes(alone, model_folder) == 4 * weights


def test_a_folder_that_is_not_there_yet_is_judged_by_the_one_above(tmp_path):
    assert checks.nearest_folder(tmp_path / "a/b") == tmp_path
    assert states(checks.machine(tmp_path / "a/b"))["clock"] == OK


def test_a_recipe_without_its_inputs_fails_with_their_names(capsys, monkeypatch, model_folder):
    monkeypatch.setenv("WORLD_SIZE", "1")  # of pods; what the command sets is taken back
    monkeypatch.setenv("OREAL_JUDGE_URLS", "none")
    recipe = "examples/recipes/oreal.py:oreal_7b_8_gpus"
    assert main.main(["doctor", "--quick", recipe]) == 1
    assert "expected a folder with a Hugging Face model" in " ".join(capsys.readouterr().out.split())
    small = [f"model.path={model_folder}", "engine.max_model_len=64", "parallel.tensor=1", "parallel.sequence=false"]
    small += ["model.dtype=float32", "data.held_out="]
    assert main.main(["doctor", "--quick", recipe, *(word for one in small for word in ("--set", one))]) == 1
    assert os.environ["WORLD_SIZE"] == "8"  # the recipe's
    shown = capsys.readouterr().out
    assert "oreal_prompts.jsonldoesnotexist" in "".join(shown.split()) and "1 of" in shown


def test_the_cause_is_told_rather_than_what_followed():
    errors = "Traceback:\n  File x\nRuntimeError: no room\n\nE1121 failed (exitcode: 1)\nChildFailedError:\n"
    assert real_run_launcher.first_error(errors) == "RuntimeError: no room"
    ranked = "\n".join(f"[rank0]: {line}" for line in errors.splitlines())
    assert real_run_launcher.first_error(f"{ranked}\ntorch.ChildFailedError: \n") == "RuntimeError: no room"
    assert real_run_launcher.first_error("") == "ended without an error message"
