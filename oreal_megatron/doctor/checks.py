"""Checks of a machine and of what a recipe needs: each examines one thing and says how to fix it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from oreal_kernels import native
from packaging.version import Version

from oreal_megatron.config import Config, ConfigError, JudgeConfig
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.plan import memory
from oreal_megatron.plan.gpus import GPUS
from oreal_megatron.plan.scenario import Scenario
from oreal_megatron.runtime import checkpoint_folders, versions
from oreal_megatron.session.inputs import read_inputs

OK, WARNING, FAILED, ABSENT = "ok", "warning", "FAILED", "absent"
MAX_CLOCK_SKEW_S, MIN_SHARED_MEMORY_GIB = 5.0, 1.0


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """Result of one check. ABSENT: missing, and optional."""

    name: str
    state: str
    detail: str
    fix: str = ""


def software() -> Iterator[CheckResult]:
    """Check interpreter and packages, without importing the large ones."""
    version, supported = platform.python_version(), (3, 11) <= sys.version_info[:2] <= (3, 13)
    fix = "" if supported else "use Python 3.11, 3.12 or 3.13 in a new environment"
    yield CheckResult("Python", OK if supported else FAILED, version, fix)
    yield from accelerator()
    for name, releases in (("Megatron-core", versions.MEGATRON), ("vLLM", versions.VLLM)):
        try:
            yield CheckResult(name, OK, versions.check(releases))
        except ConfigError as error:
            yield CheckResult(name, FAILED, str(error), f"pip install {_requirement(releases)}")
    yield package("Triton", "triton", "GPU kernels need it: pip install triton", needed=True)
    yield package("transformers", "transformers", "pip install transformers", needed=True)
    yield package("Transformer Engine", "transformer-engine", 'optional; used with model.layers="transformer_engine"')
    yield apex()
    yield CheckResult("optimizer", OK, "torch's AdamW, even if Transformer Engine or apex provide FusedAdam")
    if native.available():
        yield CheckResult("native kernels", OK, native.LIBRARY.name)
    else:
        fix = "only needed for fast runs on CPUs: pip install --no-build-isolation -e . with cmake and a C++ compiler"
        yield CheckResult("native kernels", ABSENT, "torch is used instead", fix)


def accelerator() -> Iterator[CheckResult]:
    """Check torch, its CUDA and NCCL, and that the GPUs respond and are free."""
    cuda = torch.version.cuda
    result = package("torch", "torch", "pip install torch", needed=True)
    yield dataclasses.replace(result, detail=f"{result.detail}, built for {'CUDA ' + cuda if cuda else 'CPUs'}")
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        if driver and not cuda:
            yield CheckResult(
                "CUDA", FAILED, "there are GPUs, but this torch was built for CPUs", "pip install -e .[gpu]"
            )
        elif driver:
            fix = "nvidia-smi shows the driver: its CUDA version must be at least torch's; is a GPU assigned to you?"
            yield CheckResult("CUDA", FAILED, "torch cannot access the GPUs", fix)
        else:
            yield CheckResult("CUDA", ABSENT, "no GPU", "processes run on CPUs, for tests and the quickstart")
        return
    free, total = zip(*(torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count())), strict=True)
    names = ", ".join(sorted({torch.cuda.get_device_name(device) for device in range(len(free))}))
    used = max(size - left for left, size in zip(free, total, strict=True)) / 2**30
    fix = f"another process uses {used:.0f} GiB of a GPU; nvidia-smi shows it" if used > 4 else ""
    yield CheckResult("CUDA", WARNING if fix else OK, f"{len(free)} x {names}, {min(total) / 2**30:.0f} GiB", fix)
    yield CheckResult("NCCL", OK, ".".join(map(str, torch.cuda.nccl.version())))


def package(name: str, distribution: str, fix: str, needed: bool = False) -> CheckResult:
    """Check that a package is installed and recent enough; `fix` tells how to install it."""
    version, first = versions.installed(distribution), versions.AT_LEAST.get(distribution, "0")
    if not version:
        return CheckResult(name, FAILED if needed else ABSENT, "not installed", fix)
    if Version(version) < Version(first):
        fix = f"pip install '{distribution}>={first}'"
        return CheckResult(name, FAILED, f"{version} is installed; {first} or newer is supported", fix)
    return CheckResult(name, OK, version)


def apex() -> CheckResult:
    """Check that apex, if installed, is NVIDIA's: the package of that name on PyPI is unrelated."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return CheckResult(
            "apex", ABSENT, "not installed", "optional: other implementations of its fused operations are used"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return CheckResult("apex", OK, f"NVIDIA's, {versions.installed('apex')}")
    fix = "pip uninstall apex; NVIDIA's is optional and built from its repository"
    return CheckResult("apex", FAILED, "PyPI's apex, an unrelated package that Megatron-core would try to use", fix)


def machine(run: Path) -> Iterator[CheckResult]:
    """Check shared memory, and the clock against the file system of the run folder."""
    size = shutil.disk_usage("/dev/shm").total / 2**30
    fix = "" if size >= MIN_SHARED_MEMORY_GIB else "NCCL and vLLM use it; give a container more (--shm-size)"
    yield CheckResult("shared memory", WARNING if fix else OK, f"{size:.1f} GiB in /dev/shm", fix)
    folder = nearest_folder(run)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            skew = abs(os.stat(file.name).st_mtime - time.time())
    except OSError as error:
        yield CheckResult(
            "run folder", FAILED, f"{folder}: {error.strerror}", "choose one that can be written: --set run=..."
        )
        return
    fix = (
        "" if skew < MAX_CLOCK_SKEW_S else "set the clocks with NTP: logs of several nodes cannot be compared otherwise"
    )
    yield CheckResult("clock", WARNING if fix else OK, f"{skew:.1f} s off the run folder's file system", fix)


def disk(config: Config, weights: Path) -> CheckResult:
    """Check the space for checkpoints and for the exported policies in best/ and policy/.

    Needed are the checkpoints kept and the one being written, less those that exist already.
    """
    existing = len(checkpoint_folders.complete(Path(config.run) / "checkpoints"))
    count = max(config.checkpoint.keep + 1 - existing, 1)
    needed = count * checkpoint_bytes(config, weights) + 2 * weight_bytes(weights)
    free = shutil.disk_usage(nearest_folder(Path(config.run))).free
    detail = f"{free / 1e9:.0f} GB free, {count} more checkpoints, best/ and policy/ need {needed / 1e9:.0f} GB"
    fix = "" if free > needed else "free some, choose another run folder (--set run=...), or lower checkpoint.keep"
    return CheckResult("disk", FAILED if fix else OK, detail, fix)


def checkpoint_bytes(config: Config, weights: Path) -> float:
    """Return the size of a checkpoint: weights, and main weights with two moments in float32, of all trained models.

    `weights`: folder of the starting policy, stored in config.model.dtype.
    """
    ratio = {"bfloat16": (2 + 12) / 2, "float32": (4 + 12) / 4}[config.model.dtype]
    return weight_bytes(weights) * ratio * (1 + config.reward_model.enabled)


def weight_bytes(folder: Path) -> int:
    """Return the size of the weights of a Hugging Face folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def host_memory(config: Config, arch: Architecture) -> CheckResult:
    """Compare the memory of this node with what `oreal plan` computes."""
    world = config.gpus or 1
    scenario = Scenario(config, arch, next(iter(GPUS.values())), world, min(world, 8))
    needed, present = (
        memory.host_peak(memory.host_bytes(scenario)),
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )
    fix = "" if present > needed else "use nodes with more memory, or more nodes; `oreal plan` shows what needs it"
    detail = f"{present / 1e9:.0f} GB, {needed / 1e9:.0f} GB are needed"
    return CheckResult("host memory", FAILED if fix else OK, detail, fix)


def nearest_folder(path: Path) -> Path:
    """Return the nearest existing folder at or above a path."""
    path = path.absolute()
    return path if path.is_dir() else nearest_folder(path.parent)


def inputs(config: Config) -> Iterator[CheckResult]:
    """Check recipe, model and problems as `oreal train` reads them."""
    try:
        recipe = read_inputs(config)
    except ConfigError as error:
        yield CheckResult("recipe and model", FAILED, str(error))
        return
    yield CheckResult(
        "recipe and model", OK, f"{recipe.folder.path}, {recipe.arch.layers} layers of {recipe.arch.family}"
    )
    for name, path in (("prompts", config.data.path), ("held-out problems", config.data.held_out)):
        if not path and name != "prompts":
            yield CheckResult(name, ABSENT, "none", "without data.held_out nothing is evaluated")
            continue
        try:
            yield CheckResult(name, OK, f"{len(recipe.prompts(path))} of {path}")
        except ConfigError as error:
            yield CheckResult(name, FAILED, str(error))
    yield disk(config, recipe.folder.path)
    yield host_memory(config, recipe.arch)


def judges(config: JudgeConfig) -> list[CheckResult]:
    """Send every judge one easy question. A run needs at least one judge: the others are only warnings."""
    results = [_check_judge(config, url) for url in config.urls]
    if any(result.state == OK for result in results):
        results = [
            dataclasses.replace(result, state=WARNING) if result.state == FAILED else result for result in results
        ]
    return results


def _check_judge(config: JudgeConfig, url: str) -> CheckResult:
    from oreal_megatron.runtime.chat_client import ServersDown
    from oreal_megatron.verify.judge import JudgeClient

    once = dataclasses.replace(config, urls=(url,), retries=0, all_down_wait_s=2.0, read_timeout_s=30.0, cache="")
    client = JudgeClient(once)
    try:
        outcome, seconds, _ = client.judge("What is 1 + 1?", "2", "2.0").result()
    except ServersDown:
        return CheckResult(f"judge {url}", FAILED, client.health()[url], f"is it up? curl {url}/v1/models")
    finally:
        client.close()
    correct = outcome.value == "correct"
    fix = "" if correct else "it did not confirm that 2.0 equals 2; is it a chat model?"
    return CheckResult(f"judge {url}", OK if correct else FAILED, f"{outcome.value} after {seconds:.1f} s", fix)


def _requirement(supported: dict[str, tuple[str, str]]) -> str:
    """Return the requirement of the first of these distributions, for pip."""
    name, (first, stop) = next(iter(supported.items()))
    return f"'{name}>={first},<{stop}'"
