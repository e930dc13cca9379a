"""How the native library gets into a wheel and a checkout, with a C++ compiler and without."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
from oreal_kernels import native

ROOT = Path(__file__).parents[2]
COMPILER = bool(shutil.which("cmake") and shutil.which("c++"))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no cmake or no C++ compiler is here")
LIBRARY = "oreal_kernels/liboreal_kernels.so"


@pytest.fixture
def checkout(tmp_path):
    """A copy, because setuptools leaves a build folder and takes old files from one."""
    source = tmp_path / "checkout"
    for name in ("oreal_megatron", "kernels", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture
def without_compiler(tmp_path):
    """An environment whose PATH has cmake and make, where this machine has them, but no compiler."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("cmake", "ctest", "make"):
        if program := shutil.which(name):
            (folder / name).symlink_to(program)
    return {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(folder)}


def wheel_of(checkout: Path, environment: dict[str, str]) -> Path:
    folder = checkout.parent / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder]
    subprocess.run([*command, checkout], env=environment, check=True, capture_output=True)
    (wheel,) = folder.iterdir()
    return wheel


def build_editable(checkout: Path, environment: dict[str, str]) -> None:
    """What `pip install -e .` does before it installs."""
    code = "import sys, setuptools.build_meta as build; build.build_editable(sys.argv[1])"
    command = [sys.executable, "-c", code, checkout.parent]
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)


@needs_compiler
def test_a_wheel_with_the_library_is_of_one_platform_and_any_python(checkout, tmp_path):
    wheel = wheel_of(checkout, dict(os.environ))
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none") and platform != "any"
    with zipfile.ZipFile(wheel) as archive:
        assert LIBRARY in archive.namelist() and not [name for name in archive.namelist() if "csrc" in name]
        library = ctypes.CDLL(archive.extract(LIBRARY, tmp_path))
    assert library.oreal_abi_version() == native.ABI_VERSION


def test_a_wheel_without_compiler_is_pure_and_complete_otherwise(checkout, without_compiler):
    wheel = wheel_of(checkout, without_compiler)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert LIBRARY not in names and "oreal_kernels/native.py" in names


@pytest.mark.full
@needs_compiler
def test_an_editable_install_puts_the_library_into_the_checkout(checkout):
    build_editable(checkout, dict(os.environ))
    assert ctypes.CDLL(str(checkout / "kernels" / LIBRARY)).oreal_abi_version() == native.ABI_VERSION


@pytest.mark.full
def test_an_editable_install_without_compiler_succeeds(checkout, without_compiler):
    build_editable(checkout, without_compiler)
    assert not (checkout / "kernels" / LIBRARY).exists()


@pytest.mark.skipif(not shutil.which("ctest"), reason="no cmake is here")
def test_the_tiers_of_ctest_need_no_compiler(checkout, without_compiler, tmp_path):
    build = tmp_path / "build"
    subprocess.run(["cmake", "-B", build, "-S", checkout], env=without_compiler, check=True, capture_output=True)
    tiers = subprocess.run(["ctest", "-N", "--test-dir", build], env=without_compiler, check=True, capture_output=True)
    assert b"Total Tests: 4" in tiers.stdout


@pytest.fixture
def loading(monkeypatch):
    """Loads the library from another place; its own result is remembered again afterwards."""
    native.load.cache_clear()
    yield lambda path: monkeypatch.setattr(native, "LIBRARY", path)
    monkeypatch.undo()
    native.load.cache_clear()


def test_a_missing_library_is_said_once(loading, tmp_path):
    loading(tmp_path / "liboreal_kernels.so")
    with pytest.warns(UserWarning, match="was not built, so torch computes instead, more slowly; `pip install"):
        assert not native.available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load() is None
    with pytest.raises(RuntimeError, match="use torch without it"):
        native.features()


@needs_compiler
def test_a_library_of_another_version_is_not_used(loading, tmp_path):
    (tmp_path / "old.cpp").write_text('extern "C" int oreal_abi_version() { return 0; }')
    library = tmp_path / "liboreal_kernels.so"
    subprocess.run(["c++", "-shared", "-fPIC", tmp_path / "old.cpp", "-o", library], check=True)
    loading(library)
    with pytest.warns(UserWarning, match=f"has version 0 of its interface; expected {native.ABI_VERSION}"):
        assert not native.available()
