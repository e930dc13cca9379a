"""Packages that Python files import, and distributions that pyproject.toml declares."""

from __future__ import annotations

import ast
import functools
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import ROOT

NOT_FOR_USERS = ("dev", "docs")  # extras


def project() -> dict[str, Any]:
    """Return the [project] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def imported_modules(source: str, package: str = "") -> Iterator[str]:
    """Iterate over the modules that a source text imports, also inside functions and by importlib.

    For `from a import b` both a and a.b: b may be a module. `package` resolves relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*parents, *([module] if module else [])])
                yield from (base, *(f"{base}.{alias.name}" for alias in names))
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module


def declared_requirements() -> list[Requirement]:
    """Return the dependencies, and what the extras for users add."""
    extras = [lines for name, lines in project()["optional-dependencies"].items() if name not in NOT_FOR_USERS]
    return [Requirement(line) for line in sum(extras, project()["dependencies"])]


def required_distributions() -> set[str]:
    """Return the installed distributions that our dependencies require, directly or through others, without extras."""
    pending = [Requirement(line) for line in project()["dependencies"]]
    closure: set[str] = set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in closure or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        closure.add(name)
        pending += map(Requirement, lines)
    return closure


@functools.cache
def providers() -> Mapping[str, list[str]]:
    """Return the installed distributions by the top-level packages that they provide."""
    return metadata.packages_distributions()


def provided_by(package: str, distributions: Iterable[str]) -> bool:
    """Return whether one of the distributions provides a top-level package, or has its name."""
    names = [package, *providers().get(package, [])]
    return not {canonicalize_name(name) for name in names}.isdisjoint(distributions)
