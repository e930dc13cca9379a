"""tools/fuzz_math_equality.py decides the truth on its own, and finds planted errors."""

import importlib.util
import sys
from pathlib import Path

import mpmath
import pytest

from oreal_megatron.math_equality import Graded

TOOL = Path(__file__).parents[2] / "tools/fuzz_math_equality.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("fuzz_math_equality", TOOL)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    mpmath.mp.dps = 60
    yield module
    mpmath.mp.dps = 15


def test_the_rules_accept_no_wrong_answer_and_most_right_ones(tool):
    cases = list(tool.cases(450, seed=3))
    graded = [(case, tool.grade(case.gold, case.response).outcome == "correct") for case in cases]
    assert [case for case, correct in graded if correct and not case.right] == []
    right = [correct for case, correct in graded if case.right]
    assert len({case.kind for case in cases}) == len(tool.MAKERS)
    assert len(right) > 100 and sum(right) >= 0.97 * len(right)


def test_a_planted_error_ends_in_exit_code_1(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "grade", lambda gold, response: Graded("correct", "exact", response))
    monkeypatch.setattr("sys.argv", ["fuzz", "--count", "45", "--rules-only"])
    assert tool.main() == 1
    assert "rules: false accepts" in capsys.readouterr().out
