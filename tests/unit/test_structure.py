"""The house: which room may import which, where the worlds are, what a wheel contains."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "oreal_megatron"
# Lower rooms know nothing of higher ones; rooms of one height do not know each other.
LEVELS = (
    ("config", "records", "math_equality"),
    ("protocols",),
    ("runtime", "settings", "algo", "models"),
    ("data", "verify", "rollout", "mcore", "convert", "reshard"),
    ("observe", "session", "loop"),
    ("evaluation", "plan"),
    ("training",),
    ("doctor",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {package: height for height, packages in enumerate(LEVELS) for package in packages}
WORLDS = {"megatron": {"mcore"}, "vllm": {"rollout"}, "httpx": {"verify"}}


def imports(file: Path) -> set[str]:
    """Dotted names that a file imports, function bodies included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} has a relative import, which hides its room"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file):
    room = room_of(file)
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == "oreal_megatron" and len(parts) > 1 and parts[1] in HEIGHT and parts[1] != room:
            assert HEIGHT[parts[1]] < HEIGHT[room], f"{room} imports {parts[1]}, which is not below it"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_world_is_touched_in_its_room_only(file):
    for name in imports(file):
        world = name.split(".")[0]
        assert world not in WORLDS or room_of(file) in WORLDS[world], f"{room_of(file)} imports {world}"
        assert not name.startswith("megatron.training"), "megatron.core only"


def test_every_room_has_its_height():
    assert {room_of(file) for file in FILES} == set(HEIGHT)


def test_kernels_import_torch_and_triton_only():
    for file in (ROOT / "kernels/oreal_kernels").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(file)} - sys.stdlib_module_names
        assert outside <= {"torch", "triton", "oreal_kernels"}, file


def test_kernels_folder_shadows_nothing():
    assert not (ROOT / "kernels/__init__.py").exists()
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec and spec.origin)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "None", "a namespace without a file at most, never a package of ours"


def test_both_packages_come_from_this_checkout_from_any_folder(tmp_path):
    code = "import oreal_megatron, oreal_kernels; print(oreal_megatron.__file__, oreal_kernels.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [
        str(PACKAGE / "__init__.py"),
        str(ROOT / "kernels/oreal_kernels/__init__.py"),
    ]


def test_a_wheel_contains_exactly_the_two_packages(tmp_path):
    source = tmp_path / "source"  # a copy, because setuptools leaves a build folder and takes old files from one
    for name in ("oreal_megatron", "kernels", "tests", "tools", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "CMakeLists.txt"):
        shutil.copy(ROOT / name, source)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*wheel, "-w", tmp_path, source], check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"oreal_megatron", "oreal_kernels"}
    assert "oreal_megatron/mcore/scorer.py" in names and "oreal_kernels/linear_logprob.py" in names


def test_the_command_needs_no_gpu_library_to_say_what_it_can():
    assert importlib.util.find_spec("oreal_megatron.cli.main")
    help_text = subprocess.run([sys.executable, "-m", "oreal_megatron", "--help"], capture_output=True, text=True)
    assert help_text.returncode == 0 and all(word in help_text.stdout for word in ("train", "sft", "evaluate"))


def test_the_loop_in_the_readme_is_the_loop():
    quoted = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    source = textwrap.dedent(
        (PACKAGE / "loop.py").read_text().split("with run.steps() as steps:\n")[1].split("\n\n\n")[0]
    )
    assert quoted.strip() == source.strip()
