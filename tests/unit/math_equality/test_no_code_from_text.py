"""No function that turns a string into code is named in math_equality or verify."""

import ast
from pathlib import Path

import pytest

import oreal_megatron

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "parse_expr", "sympify", "S", "lambdify", "literal_eval", "pickle",
    "import_module", "system", "popen", "sympy", "latex2sympy", "latex2sympy2_extended", "parse_latex", "math_verify",
    "mpmathify", "convert",
}  # fmt: skip
PACKAGE = Path(oreal_megatron.__file__).parent
FILES = sorted(path for name in ("math_equality", "verify") for path in (PACKAGE / name).glob("*.py"))


def names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and (node.value.id, node.attr) == ("re", "compile")):
                yield node.attr
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (part for alias in node.names for part in alias.name.split("."))
            yield from (getattr(node, "module", None) or "").split(".")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_name_that_runs_text(path):
    assert FORBIDDEN & set(names(ast.parse(path.read_text()))) == set()
