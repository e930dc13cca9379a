"""Fixtures of all tiers: small samples, a small model on disk, functions run in several gloo processes."""

from __future__ import annotations

import importlib.util
import io
import json
import multiprocessing
import os
import random
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("shared machine", deadline=None)  # a first call imports, a neighbour computes
hypothesis.settings.load_profile("shared machine")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def addition_task() -> Any:
    """tools/make_addition_task.py as a module."""
    spec = importlib.util.spec_from_file_location("make_addition_task", ROOT / "tools/make_addition_task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def model_folder(addition_task: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with random weights: 4 layers, 4 heads of 32 (vLLM on CPU takes no smaller), 2 key-value groups."""
    folder = tmp_path_factory.mktemp("model") / "untied"
    addition_task.make_model(folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def tied_model_folder(addition_task: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tied"
    addition_task.make_model(folder, seed=2, tied=True)
    return folder


@pytest.fixture(scope="session")
def write_model() -> Callable[[Path, str], str]:
    """Writes a Hugging Face folder with random weights for a row of families.json, with some fields changed."""

    def write(folder: Path, family: str, **changes: Any) -> str:
        from safetensors.torch import save_file

        from oreal_megatron.models import architecture, tensors

        hf = json.loads((ROOT / "tests/families.json").read_text())[family] | changes
        arch, generator, weights = architecture.read(hf), torch.Generator().manual_seed(8), {}
        for entry in tensors.entries(arch, 1, 1, 0, "lm"):
            for name, shape in tensors.hf_shapes(entry, arch).items():
                drawn = torch.randn(shape, generator=generator) / 10
                weights[name] = 1 + drawn if "norm" in name else drawn
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(hf | {"torch_dtype": "float32"}))
        (folder / "tokenizer_config.json").write_text("{}")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return write


@pytest.fixture
def make_samples() -> Callable[..., list]:
    """Pairs of a right and a wrong sample with random tokens and lengths, advantages as RLOO would give."""
    from oreal_megatron.records import Sample

    def make(pairs: int, seed: int = 0, vocabulary: int = 80) -> list[Sample]:
        generator = random.Random(seed)

        def tokens(low: int, high: int) -> tuple[int, ...]:
            return tuple(generator.randrange(4, vocabulary) for _ in range(generator.randint(low, high)))

        samples = []
        for _ in range(pairs):
            prompt, right = tokens(2, 9), generator.randint(1, 15)
            advantage = 2 * (16 - right) / 15
            samples.append(Sample(prompt, tokens(1, 12), 1.0, advantage))
            samples.append(Sample(prompt, tokens(1, 12), -1.0, -2 * right / 15))
        return samples

    return make


@pytest.fixture(scope="session")
def in_processes() -> Callable[..., list[Any]]:
    """Run a module-level function in `world` gloo processes and return each rank's result."""
    return _in_processes


def _in_processes(world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240.0) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results: Any = context.Queue()
    workers = [
        context.Process(target=_child, args=(rank, world, port, results, function, args)) for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    try:
        gathered = dict(results.get(timeout=timeout_s) for _ in workers)
    finally:
        for worker in workers:
            worker.join(timeout=20)
            worker.kill()
    failures = [f"rank {rank}:\n{error}" for rank, (_, error) in sorted(gathered.items()) if error]
    assert not failures, "\n".join(failures)
    return [torch.load(io.BytesIO(gathered[rank][0]), weights_only=False) for rank in range(world)]


def _child(rank: int, world: int, port: int, results: Any, function: Callable[..., Any], args: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    try:
        packed = io.BytesIO()  # bytes, because tensors in a queue are file descriptors of a process that is gone
        torch.save(function(*args), packed)
        results.put((rank, (packed.getvalue(), "")))
    except BaseException:
        results.put((rank, (None, traceback.format_exc())))
        sys.exit(1)
