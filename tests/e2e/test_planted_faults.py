"""Ruff's docstring rules and mypy report planted faults, with this checkout's own settings."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

HEAD = '"""A module."""\n\n\n'
DOCSTRING_FAULTS = [  # rule, text of a file
    ("D100", "LIMIT = 1\n"),
    ("D101", HEAD + "class Row:\n    pass\n"),
    ("D102", HEAD + 'class Row:\n    """A row."""\n\n    def total(self) -> int:\n        return 1\n'),
    ("D103", HEAD + "def total() -> int:\n    return 1\n"),
    ("D205", HEAD + 'def total() -> int:\n    """Return the sum.\n    Of all."""\n    return 1\n'),
    ("D400", HEAD + 'def total() -> int:\n    """Return the sum"""\n    return 1\n'),
    ("D401", HEAD + 'def total() -> int:\n    """The sum of all."""\n    return 1\n'),
    ("D403", HEAD + 'def total() -> int:\n    """return the sum."""\n    return 1\n'),
    ("D404", HEAD + 'class Row:\n    """This is a row."""\n'),
]
GOOD = HEAD + 'def total(values: list[int]) -> int:\n    """Return the sum of the values."""\n    return sum(values)\n'
TYPE_FAULTS = [  # mypy's code, module, text
    ("arg-type", "observe/report.py", GOOD + '\n\nRESULT = total("text")\n'),
    ("return-value", "cli/train.py", HEAD + 'def name() -> str:\n    """Return a name."""\n    return 1\n'),
    ("no-untyped-def", "loop.py", HEAD + 'def total(values):\n    """Return the sum."""\n    return sum(values)\n'),
    ("type-arg", "session/start.py", HEAD + 'def total(values: list) -> None:\n    """Add up."""\n'),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An empty project with this checkout's pyproject.toml."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("oreal_megatron", "kernels/oreal_kernels"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text('"""A package."""\n')
    return tmp_path


def run(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of this environment in the tree."""
    return subprocess.run([sys.executable, "-m", *words], cwd=tree, capture_output=True, text=True)


@pytest.mark.parametrize("package", ["oreal_megatron", "kernels/oreal_kernels"])
def test_ruff_reports_docstrings_against_the_rules(package, tree):
    for rule, text in DOCSTRING_FAULTS:
        (tree / package / f"planted_{rule.lower()}.py").write_text(text)
    result = run(tree, "ruff", "check", "--no-cache", "--output-format=concise", ".")
    for rule, _ in DOCSTRING_FAULTS:
        assert re.search(rf"planted_{rule.lower()}.py:[0-9:]+ {rule} ", result.stdout), (rule, result.stdout)


def test_ruff_reports_no_docstring_of_tests_and_none_that_is_right(tree):
    (tree / "oreal_megatron/right.py").write_text(GOOD)
    (tree / "tests").mkdir()
    (tree / "tests/test_sum.py").write_text("def test_sum():\n    assert sum([1, 2]) == 3\n")
    result = run(tree, "ruff", "check", "--no-cache", ".")
    assert result.returncode == 0, result.stdout


def test_mypy_reports_planted_faults_and_nothing_else(tree):
    for _, name, text in TYPE_FAULTS:
        path = tree / "oreal_megatron" / name
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").write_text('"""A package."""\n')
        path.write_text(text)
    (tree / "oreal_megatron/right.py").write_text(GOOD)
    result = run(tree, "mypy", "--no-incremental")
    rows = re.findall(r"^oreal_megatron/(\S+?):\d+: error: .*\[(\S+)\]$", result.stdout, re.MULTILINE)
    assert sorted(rows) == sorted((name, code) for code, name, _ in TYPE_FAULTS), result.stdout
    assert result.returncode == 1
