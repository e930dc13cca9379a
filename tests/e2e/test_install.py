"""The install script refuses a Python without wheels of every pin before it installs anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

import pytest
from repository import ROOT


@pytest.mark.parametrize("version", ["3.10.15", "3.14.0"])
def test_an_unsupported_python_is_refused_at_once(tmp_path, version):
    checkout = tmp_path / "checkout"
    for folder in ("requirements", "kernels/csrc"):
        shutil.copytree(ROOT / folder, checkout / folder)
    for file in ("tools/install_cpu.sh", "setup.py", "pyproject.toml", "CMakeLists.txt", "oreal_megatron/__init__.py"):
        (checkout / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, checkout / file)
    python = tmp_path / "python"
    info = tuple(map(int, version.split(".")))
    python.write_text(  # a Python that claims another version
        f'#!/bin/sh\n[ "$1" = --version ] && {{ echo "Python {version}"; exit; }}\n'
        f'exec python3 -c "import sys; sys.version_info = {info}; exec(sys.argv[1])" "$2"\n'
    )
    python.chmod(0o755)
    begin = time.monotonic()
    result = subprocess.run(
        ["bash", "tools/install_cpu.sh"],
        cwd=checkout,
        env=os.environ | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and not (checkout / ".venv").exists()
    assert f"Python {version}; Python 3.11, 3.12 or 3.13 is required" in result.stderr
    assert time.monotonic() - begin < 5
