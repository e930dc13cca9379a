"""Layout of the code: import order, owners of libraries, cycles, names and public types; the README quotes the loop."""

from __future__ import annotations

import importlib.util
import textwrap

from gloo_processes import PRELOADED
from repository import ROOT, load_tool

check_style = load_tool("check_style")


def test_the_checkout_has_no_fault_of_style_or_structure():
    faults = check_style.faults(ROOT)
    assert not faults, "\n" + "\n".join(f"{fault.path}:{fault.line}: {fault.rule}: {fault.text}" for fault in faults)


def test_kernels_folder_shadows_no_package_of_that_name():
    assert not (ROOT / "kernels/__init__.py").exists()


def test_the_loop_in_the_readme_is_the_loop():
    quoted = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    source = textwrap.dedent(
        (ROOT / "oreal_megatron/loop.py").read_text().split("with run.steps() as steps:\n")[1].split("\n\n\n")[0]
    )
    assert quoted.strip() == source.strip()


def test_modules_that_the_fork_server_imports_exist():
    assert all(importlib.util.find_spec(name) for name in PRELOADED), "multiprocessing ignores a missing one"
