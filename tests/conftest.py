"""Fixtures of all tiers: small samples, a small model on disk, functions run in several gloo processes."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from cost_recorder import CostRecorder
from gloo_processes import preload_engine, run_in_processes

EXAMPLES = {"default": 50, "full": 300}  # of a property that names no number
for name, examples in EXAMPLES.items():  # without a deadline: a first call imports, a neighbour computes
    hypothesis.settings.register_profile(name, deadline=None, max_examples=examples)

ROOT = Path(__file__).parent.parent
TIERS = ("unit", "dist", "engine", "e2e", "faults", "kernels", "gpu")  # folders of tests/, and markers
CHOSEN = pytest.StashKey[dict[str, int]]()
LEFT_OUT = pytest.StashKey[int]()


def tier_of(path: Path) -> str:
    """Return the folder of tests/ that a test file lies in."""
    return next((tier for tier in TIERS if path.is_relative_to(ROOT / "tests" / tier)), "")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the full matrices too: tests marked `full`")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("full" if config.getoption("--full") else "default")
    if file := os.environ.get("OREAL_TEST_COSTS"):
        config.pluginmanager.register(CostRecorder(Path(file)))
    if {tier_of(Path(arg.split("::")[0]).resolve()) for arg in config.args} == {"kernels"}:
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined; elsewhere vLLM and torch would see it


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with the tier of its folder and take out what only --full runs."""
    left_out = []
    for item in items:
        item.add_marker(tier_of(item.path))
        if item.get_closest_marker("full") and not config.getoption("--full"):
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    config.stash[LEFT_OUT] = len(left_out)


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[CHOSEN] = {tier: sum(tier_of(item.path) == tier for item in session.items) for tier in TIERS}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print how many tests of each tier were chosen, and how many are left to --full."""
    counts = ", ".join(f"{tier} {count}" for tier, count in config.stash.get(CHOSEN, {}).items())
    terminalreporter.write_line(f"tiers: {counts}; left to --full: {config.stash.get(LEFT_OUT, 0)}")


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """True if the full matrices are asked for with --full."""
    return pytestconfig.getoption("--full")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with random weights: 4 layers, 4 heads of 32 (vLLM on CPU takes no smaller), 2 key-value groups."""
    folder = tmp_path_factory.mktemp("model") / "untied"
    from small_model import make_model  # imports Triton, before the interpreter is chosen

    make_model(folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def tied_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tied"
    from small_model import make_model  # imports Triton, before the interpreter is chosen

    make_model(folder, seed=2, tied=True)
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
        for slot in range(pairs):
            prompt, right = tokens(2, 9), generator.randint(1, 15)
            advantage = 2 * (16 - right) / 15
            samples.append(Sample(prompt, tokens(1, 12), 1.0, advantage, rollout=(slot, 0)))
            samples.append(Sample(prompt, tokens(1, 12), -1.0, -2 * right / 15, rollout=(slot, 1)))
        return samples

    return make


@pytest.fixture(scope="session")
def in_processes(pytestconfig: pytest.Config) -> Callable[..., list[Any]]:
    """Run a module-level function in `world` gloo processes and return each rank's result."""
    if any(pytestconfig.stash[CHOSEN][tier] for tier in ("engine", "e2e", "faults")):
        preload_engine()
    return run_in_processes
