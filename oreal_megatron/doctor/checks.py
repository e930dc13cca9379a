"""The single checks of `oreal doctor`: each looks at one thing and says what was found and how to mend it."""

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
SKEW_S, SHARED_MEMORY_GB = 5.0, 1.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check saw. ABSENT is what may be missing."""

    name: str
    state: str
    found: str
    mend: str = ""


def software() -> Iterator[Finding]:
    """Interpreter and packages, without importing the large ones."""
    found = platform.python_version()
    python = OK if sys.version_info >= (3, 10) else FAILED
    yield Finding("Python", python, found, "" if python == OK else "3.10 or newer is needed; make a new environment")
    yield from accelerator()
    for name, supported in (("Megatron-core", versions.MEGATRON), ("vLLM", versions.VLLM)):
        try:
            yield Finding(name, OK, versions.check(supported))
        except ConfigError as error:
            yield Finding(name, FAILED, str(error), f"pip install {_wanted(supported)}")
    yield package("Triton", "triton", "the kernels of GPUs are written in it: pip install triton", needed=True)
    yield package("transformers", "transformers", "pip install transformers", needed=True)
    yield package("Transformer Engine", "transformer-engine", 'optional; used with model.layers="transformer_engine"')
    yield apex()
    yield Finding("optimizer", OK, "torch's AdamW, also where Transformer Engine or apex bring a FusedAdam")
    if native.available():
        yield Finding("native kernels", OK, native.LIBRARY.name)
    else:
        mend = "needed by fast CPU runs alone: pip install --no-build-isolation -e . with cmake and a C++ compiler"
        yield Finding("native kernels", ABSENT, "torch does their work", mend)


def accelerator() -> Iterator[Finding]:
    """torch, its CUDA and NCCL, and whether the GPUs answer and are free."""
    cuda = torch.version.cuda
    found = package("torch", "torch", "pip install torch", needed=True)
    yield dataclasses.replace(found, found=f"{found.found}, built for {'CUDA ' + cuda if cuda else 'CPUs'}")
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        if driver and not cuda:
            yield Finding("CUDA", FAILED, "there are GPUs, and this torch was built for CPUs", "pip install -e .[gpu]")
        elif driver:
            mend = (
                "nvidia-smi shows the driver: its CUDA version must not be older than torch's; is a GPU given to you?"
            )
            yield Finding("CUDA", FAILED, "torch does not reach the GPUs", mend)
        else:
            yield Finding("CUDA", ABSENT, "no GPU here", "processes run on CPUs, for tests and the quickstart")
        return
    free, total = zip(*(torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count())), strict=True)
    names = ", ".join(sorted({torch.cuda.get_device_name(device) for device in range(len(free))}))
    used = max(whole - left for left, whole in zip(free, total, strict=True)) / 2**30
    mend = f"another process holds {used:.0f} GiB of a GPU; nvidia-smi names it" if used > 4 else ""
    yield Finding("CUDA", WARNING if mend else OK, f"{len(free)} x {names}, {min(total) / 2**30:.0f} GiB", mend)
    yield Finding("NCCL", OK, ".".join(map(str, torch.cuda.nccl.version())))


def package(name: str, distribution: str, mend: str, needed: bool = False) -> Finding:
    version, first = versions.installed(distribution), versions.AT_LEAST.get(distribution, "0")
    if not version:
        return Finding(name, FAILED if needed else ABSENT, "not installed", mend)
    if Version(version) < Version(first):
        mend = f"pip install '{distribution}>={first}'"
        return Finding(name, FAILED, f"{version} is installed; supported is {first} and newer", mend)
    return Finding(name, OK, version)


def apex() -> Finding:
    """NVIDIA's apex is optional; PyPI's package of that name has nothing to do with it."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding("apex", ABSENT, "not installed", "optional: its fused operations have stand-ins here")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return Finding("apex", OK, f"NVIDIA's, {versions.installed('apex')}")
    mend = "pip uninstall apex; NVIDIA's is built from its repository, and is optional"
    return Finding("apex", FAILED, "PyPI's apex, an unrelated package that Megatron-core would try to use", mend)


def machine(run: Path) -> Iterator[Finding]:
    """Shared memory, and the clock against that of the run folder's file system."""
    size = shutil.disk_usage("/dev/shm").total / 2**30
    mend = "" if size >= SHARED_MEMORY_GB else "NCCL and vLLM talk through it; in a container give it more (--shm-size)"
    yield Finding("shared memory", WARNING if mend else OK, f"{size:.1f} GiB in /dev/shm", mend)
    folder = existing(run)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            skew = abs(os.stat(file.name).st_mtime - time.time())
    except OSError as error:
        yield Finding(
            "run folder", FAILED, f"{folder}: {error.strerror}", "name one that can be written: --set run=..."
        )
        return
    mend = "" if skew < SKEW_S else "let NTP set the clocks: logs of several machines could not be compared"
    yield Finding("clock", WARNING if mend else OK, f"{skew:.1f} s from the run folder's file system", mend)


def disk(config: Config, weights: Path) -> Finding:
    """Room for the checkpoints that are kept and the one being written, less those that are there already, and for the
    exported policies in best/ and policy/, which are replaced only when a new one is complete."""
    there = len(checkpoint_folders.complete(Path(config.run) / "checkpoints"))
    count = max(config.checkpoint.keep + 1 - there, 1)
    needed = count * checkpoint_bytes(config, weights) + 2 * weight_bytes(weights)
    free = shutil.disk_usage(existing(Path(config.run))).free
    found = f"{free / 1e9:.0f} GB free, {count} more checkpoints, best/ and policy/ take {needed / 1e9:.0f} GB"
    mend = "" if free > needed else "free some, name another run folder (--set run=...), or lower checkpoint.keep"
    return Finding("disk", FAILED if mend else OK, found, mend)


def checkpoint_bytes(config: Config, weights: Path) -> float:
    """Of one checkpoint: weights, and main weights with two moments in float32, of policy and reward model.

    `weights` holds the starting policy in as many bytes a weight as config.model.dtype says.
    """
    times = {"bfloat16": (2 + 12) / 2, "float32": (4 + 12) / 4}[config.model.dtype]
    return weight_bytes(weights) * times * (1 + config.reward_model.enabled)


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def host_memory(config: Config, arch: Architecture) -> Finding:
    """What `oreal plan` says a machine must have, against what this one has."""
    world = config.gpus or 1
    case = Scenario(config, arch, next(iter(GPUS.values())), world, min(world, 8))
    needed, there = sum(memory.host(case).values()), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    mend = "" if there > needed else "take machines with more, or recipes for more of them; `oreal plan` shows for what"
    found = f"{there / 1e9:.0f} GB, {needed / 1e9:.0f} GB are needed"
    return Finding("host memory", FAILED if mend else OK, found, mend)


def existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    path = path.absolute()
    return path if path.is_dir() else existing(path.parent)


def inputs(config: Config) -> Iterator[Finding]:
    """Recipe, model and problems as `oreal train` will read them."""
    try:
        read = read_inputs(config)
    except ConfigError as error:
        yield Finding("recipe and model", FAILED, str(error))
        return
    yield Finding("recipe and model", OK, f"{read.folder.path}, {read.arch.layers} layers of {read.arch.family}")
    for name, path in (("prompts", config.data.path), ("held-out problems", config.data.held_out)):
        if not path and name != "prompts":
            yield Finding(name, ABSENT, "none named", "without data.held_out nothing is evaluated")
            continue
        try:
            yield Finding(name, OK, f"{len(read.prompts(path))} of {path}")
        except ConfigError as error:
            yield Finding(name, FAILED, str(error))
    yield disk(config, read.folder.path)
    yield host_memory(config, read.arch)


def judges(config: JudgeConfig) -> list[Finding]:
    """Ask every host one easy question, once. A run can do without some of them, not without all."""
    found = [_judge(config, url) for url in config.urls]
    if any(finding.state == OK for finding in found):
        found = [dataclasses.replace(one, state=WARNING) if one.state == FAILED else one for one in found]
    return found


def _judge(config: JudgeConfig, url: str) -> Finding:
    from oreal_megatron.verify import judge

    once = dataclasses.replace(config, urls=(url,), retries=0, all_down_wait_s=2.0, read_timeout_s=30.0, cache="")
    asked = judge.JudgeClient(once)
    try:
        outcome, seconds = asked.submit("What is 1 + 1?", "2", "2.0").result()
    except judge.JudgesDown:
        return Finding(f"judge {url}", FAILED, asked.health()[url], f"is it up? curl {url}/v1/models")
    finally:
        asked.close()
    right = outcome.value == "correct"
    mend = "" if right else "it said that 2.0 is not 2, or no verdict at all; is it a chat model?"
    return Finding(f"judge {url}", OK if right else FAILED, f"{outcome.value} after {seconds:.1f} s", mend)


def _wanted(supported: dict[str, tuple[str, str]]) -> str:
    name, (first, stop) = next(iter(supported.items()))
    return f"'{name}>={first},<{stop}'"
