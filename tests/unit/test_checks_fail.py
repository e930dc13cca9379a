"""Each rule of tools/check_style.py reports a planted fault, and nothing on a tree without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from repository import load_tool

check_style = load_tool("check_style")
CLEAN = {
    "oreal_megatron/__init__.py": '"""Package."""\n',
    "oreal_megatron/records.py": '"""Records."""\n\n\nclass Sample:\n    """A sample."""\n',
    "oreal_megatron/loop.py": '"""Loop."""\nfrom oreal_megatron.records import Sample\n',
    "oreal_megatron/cli/__init__.py": '"""Commands."""\n',
    "oreal_megatron/algo/__init__.py": '"""Algorithms."""\n',
    "oreal_megatron/algo/loss.py": '"""Loss."""\nfrom oreal_megatron.records import Sample\n',
    "oreal_megatron/session/__init__.py": '"""Start and stop."""\n',
    "kernels/oreal_kernels/__init__.py": '"""Kernels."""\nimport torch\n',
    "README.md": "# Title\n",
}
FAULTS = [  # rule, file, text that is added to it
    ("weak name", "oreal_megatron/algo/loss.py", "kept = 1\n"),
    ("weak name", "oreal_megatron/algo/loss.py", "def total(asked: int) -> int: ...\n"),
    ("weak name", "kernels/oreal_kernels/gemm.py", "def _done() -> None: ...\n"),
    ("docstring begins with a relative word", "oreal_megatron/algo/pack.py", '"""What a step packs."""\n'),
    ("docstring begins with a relative word", "oreal_megatron/records.py", 'class Row:\n    """Of the engine."""\n'),
    ("word", "oreal_megatron/algo/loss.py", 'MESSAGE = "mend the file"\n'),
    ("word", "README.md", "Training goes on.\n"),
    ("word", "docs/concepts/resharding.md", "After the hand-over\n"),
    ("source nobody can reach", "oreal_megatron/records.py", "# see shared/design\n"),
    ("relative import", "oreal_megatron/algo/loss.py", "from . import pack\n"),
    ("library outside its package", "oreal_megatron/algo/loss.py", "def lazy():\n    import vllm\n"),
    ("library outside its package", "oreal_megatron/mcore/train.py", "from megatron.training import arguments\n"),
    ("library outside its package", "kernels/oreal_kernels/__init__.py", "import numpy\n"),
    ("import order", "oreal_megatron/records.py", "from oreal_megatron.algo import loss\n"),
    ("import order", "oreal_megatron/algo/loss.py", "import oreal_megatron.models.architecture\n"),
    ("import cycle", "oreal_megatron/records.py", "def late():\n    from oreal_megatron.loop import Sample\n"),
    ("module at the package root", "oreal_megatron/disk.py", '"""Files."""\n'),
    ("package without a level", "oreal_megatron/misc/__init__.py", '"""Anything."""\n'),
    ("long command file", "oreal_megatron/cli/train.py", "#\n" * 101),
    ("one class name in several files", "oreal_megatron/algo/loss.py", "class Sample: ...\n"),
    ("Any in a public signature", "oreal_megatron/session/start.py", "def start(engine: Any) -> None: ...\n"),
    ("Any in a public signature", "oreal_megatron/session/start.py", "def start() -> dict[str, Any]: ...\n"),
    ("Any in a public signature", "oreal_megatron/loop.py", "class Hooks:\n    def __init__(self, run: Any): ...\n"),
    ("Any in a public signature", "oreal_megatron/loop.py", "class Hooks:\n    run: Any\n"),
]


def plant(root: Path, files: dict[str, str]) -> None:
    """Write a tree of files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_a_clean_tree_has_nothing_to_report(tmp_path):
    plant(tmp_path, CLEAN)
    assert check_style.faults(tmp_path) == []


@pytest.mark.parametrize(("rule", "file", "text"), FAULTS)
def test_a_planted_fault_is_reported_where_it_is(rule, file, text, tmp_path):
    plant(tmp_path, CLEAN | {file: CLEAN.get(file, "") + text})
    faults = check_style.faults(tmp_path)
    assert rule in {fault.rule for fault in faults}
    assert any(file in f"{fault.path} {fault.text}" for fault in faults if fault.rule == rule) or rule == "import cycle"


def test_imports_for_types_make_no_cycle_and_private_signatures_may_hold_any(tmp_path):
    types = "if TYPE_CHECKING:\n    from oreal_megatron.algo.loss import Sample\n"
    plant(tmp_path, CLEAN | {"oreal_megatron/algo/pack.py": f'"""Pack."""\n{types}', "oreal_megatron/algo/loss.py":
          '"""Loss."""\nimport oreal_megatron.algo.pack\ndef _inner(x: Any): ...\n'})  # fmt: skip
    assert check_style.faults(tmp_path) == []


def test_every_rule_has_a_planted_fault():
    assert {rule for rule, _, _ in FAULTS} == set(check_style.RULES)
