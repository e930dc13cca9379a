"""Packages that ours and Megatron import are declared in pyproject.toml, or required by what is declared."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from declared_packages import (
    declared_requirements,
    imported_modules,
    project,
    provided_by,
    required_distributions,
)
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from repository import ROOT

OURS = {"oreal_megatron": ROOT / "oreal_megatron", "oreal_kernels": ROOT / "kernels/oreal_kernels"}
# Packages that files of Megatron import and that a run does without. A row here says that somebody has read why.
NOT_USED_OF_MEGATRON = {
    "amp_C apex fused_weight_gradient_mlp_cuda": "of NVIDIA apex, which is never required",
    "transformer_engine transformer_engine_torch": "of the extra `te`",
    "scaled_masked_softmax_cuda scaled_softmax_cuda scaled_upper_triang_masked_softmax_cuda": "of Megatron-LM",
    "flash_attn flash_attn_3 flashattn_hopper flash_mla": "attention is ours: mcore/varlen_attention.py",
    "deep_ep grouped_gemm": "expert parallelism, which is refused",
    "mamba_ssm causal_conv1d": "models without attention",
    "flashinfer torch_memory_saver pynvml cuda": "inference by Megatron, and graphs of pipeline stages",
    "modelopt": "quantisation",
    "tiktoken wget": "Megatron's tokenizers",
    "multistorageclient": "checkpoints in object stores",
    "nvtx wandb": "profiles and logs of Megatron's own trainer",
    "einops": "hierarchical context parallelism, Megatron's FSDP, decoding by Megatron",
}


def packages(modules: Iterable[str]) -> set[str]:
    """Return the top-level packages of modules that are neither Python's nor ours."""
    return {module.split(".")[0] for module in modules} - sys.stdlib_module_names - OURS.keys()


def undeclared(names: set[str]) -> set[str]:
    """Return the packages that no declared distribution provides."""
    declared = {canonicalize_name(requirement.name) for requirement in declared_requirements()}
    return {name for name in names if not provided_by(name, declared)}


def test_every_package_that_ours_import_is_declared():
    files = [file for folder in OURS.values() for file in folder.rglob("*.py")]
    names = packages(module for file in files for module in imported_modules(file.read_text(), "oreal_megatron"))
    assert {"torch", "megatron", "vllm", "wandb", "pyarrow"} <= names, "also those that are imported late"
    assert not undeclared(names)


@pytest.mark.parametrize(
    "source",
    [
        "import antlr4",
        "from hypothesis.strategies import text",
        "def late():\n    import mkdocs.config as other",
        "if TYPE_CHECKING:\n    from pytest import Item",
        "tracker = importlib.import_module('absent_package.part')",
    ],
)
def test_an_undeclared_import_is_reported(source):
    assert len(undeclared(packages(imported_modules(source)))) == 1


def megatron_imports() -> dict[str, list[str]]:
    """Return the modules of Megatron that ours import, directly or through others, and what each of them imports."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0]).parents[1]
    ours = (ROOT / "oreal_megatron/mcore").rglob("*.py")
    pending = [module for file in ours for module in imported_modules(file.read_text(), "oreal_megatron.mcore")]
    imports: dict[str, list[str]] = {}
    while pending:
        name = pending.pop()
        parent, path = name.rpartition(".")[0], root / name.replace(".", "/")
        is_package = (path / "__init__.py").is_file()
        file = path / "__init__.py" if is_package else path.with_suffix(".py")
        if name.startswith("megatron.core") and name not in imports and file.is_file():
            imports[name] = list(imported_modules(file.read_text(), name if is_package else parent))
            pending += [parent, *imports[name]]
    return imports


def test_what_megatron_imports_on_our_paths_is_required_or_not_used():
    """`full`: tests/e2e/test_dependencies.py trains and saves where nothing else can be imported."""
    imports, required = megatron_imports(), required_distributions()
    assert "megatron.core.dist_checkpointing.strategies.filesystem_async" in imports, "it is imported late"
    not_used = set(" ".join(NOT_USED_OF_MEGATRON).split())
    names = packages(module for modules in imports.values() for module in modules) - not_used
    assert not {name for name in names if not provided_by(name, required)}


def test_transformer_engine_is_bounded_as_megatron_core_bounds_it():
    (own,) = map(Requirement, project()["optional-dependencies"]["te"])
    requirements = map(Requirement, metadata.requires("megatron-core") or [])
    (megatron,) = {line.specifier for line in requirements if line.name == "transformer-engine"}
    sides = (own.specifier, megatron)
    bounds = [{(bound.operator, Version(bound.version).release[:2]) for bound in side} for side in sides]
    assert bounds[0] == bounds[1] and {operator for operator, _ in bounds[0]} == {">=", "<"}
