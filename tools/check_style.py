#!/usr/bin/env python3
"""Check names, texts, imports and public types of a checkout; exit with 1 if anything is reported.

    python3 tools/check_style.py [--all] [PATH ...]

Prints the number of places per rule and the first ten of each, all of them with --all; with paths, only those below
the paths. Ruff checks the form of docstrings, mypy the types; this checks what they cannot express.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "oreal_megatron"
KERNELS = "kernels/oreal_kernels"
# Lower packages know nothing of higher ones; packages of one level do not know each other (docs: architecture).
LEVELS = (
    ("records", "config", "math_equality"),
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
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
LIBRARY_OWNERS = {"megatron": {"mcore"}, "vllm": {"rollout"}, "httpx": {"runtime"}}
ROOT_MODULES = {"records", "protocols", "config", "settings", "loop", "__init__", "__main__"}
TYPED = ("loop.py", "session/", "reshard/", "evaluation/", "training/")  # no Any in their public signatures
CLI_LINES = 100

# Names that could stand in any program.
WEAK_NAMES = frozenset(
    """
    asked bad cut done found handed held here kept made mine one piece place rest said spot theirs told wanted whole
    """.split()
)
WORDS = re.compile(
    r"\b(mend\w*|whoever|for ever|save that|gone on|goes on|out of all proportion|no multiple of|a sentence|under way"
    r"|hand(?:s|ed|ing)?[- ]over|handover)\b",
    re.IGNORECASE,
)
UNREACHABLE = re.compile(r"\bpapers\.md|shared/design|\bARCHITECTURE\.md|\bstyle\.md|\bpeers\.md|\bfirst_use\.md")
RELATIVE = re.compile(r"(Of|What|Whether|Whoever|Where|Who|How|As|That)\b")
RULES = (
    "weak name", "docstring begins with a relative word", "word", "source nobody can reach", "relative import",
    "library outside its package", "import order", "import cycle", "module at the package root",
    "package without a level", "long command file", "one class name in several files", "Any in a public signature",
)  # fmt: skip
TEXT_FILES = ("*.md", "docs/**/*.md", "examples/**/*", "tools/**/*", "requirements/*", ".github/**/*", "kernels/**/*")
TEXT_SUFFIXES = {".md", ".py", ".sh", ".toml", ".yml", ".yaml", ".cpp", ".h", ".cu", ".txt", ".json"}


class Fault(NamedTuple):
    """One reported place."""

    rule: str
    path: str
    line: int
    text: str


def faults(root: Path) -> list[Fault]:
    """Return everything to report in the checkout at `root`, in order of rule and place."""
    checks = (names, docstrings, words, imports, import_cycles, layout, class_names, untyped_signatures)
    return [fault for check in checks for fault in check(root)]


def sources(root: Path, *folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Yield the relative path and the syntax tree of each Python file of the packages, tests excluded."""
    for folder in folders or (PACKAGE, KERNELS):
        for path in sorted((root / folder).rglob("*.py")):
            yield str(path.relative_to(root)), ast.parse(path.read_text())


def names(root: Path) -> Iterator[Fault]:
    """Report variables, arguments and functions whose name says nothing."""
    for path, tree in sources(root):
        for node in ast.walk(tree):
            name = ""
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.arg):
                name = node.arg
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = node.name
            if name.strip("_") in WEAK_NAMES:
                yield Fault("weak name", path, node.lineno, name)


def docstrings(root: Path) -> Iterator[Fault]:
    """Report docstrings that begin with a relative word instead of a verb or a noun."""
    for path, tree in sources(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if RELATIVE.match(text):
                    yield Fault(
                        "docstring begins with a relative word", path, getattr(node, "lineno", 1), first_line(text)
                    )


def words(root: Path) -> Iterator[Fault]:
    """Report words that readers stumble over, and sources that a reader cannot reach."""
    this_file = Path(__file__).name
    paths = {path for pattern in (f"{PACKAGE}/**/*.py", *TEXT_FILES) for path in root.glob(pattern)}
    for path in sorted(paths):
        if path.suffix not in TEXT_SUFFIXES or path.name == this_file or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            for rule, pattern in (("word", WORDS), ("source nobody can reach", UNREACHABLE)):
                if match := pattern.search(line):
                    yield Fault(rule, str(path.relative_to(root)), number, f"{match.group()}: {line.strip()[:110]}")


def imports(root: Path) -> Iterator[Fault]:
    """Report imports against the order of packages, and libraries outside the package that owns them."""
    for path, tree in sources(root, PACKAGE):
        owner = package_of(path)
        for node, name in imported(tree):
            parts = name.split(".")
            if not parts[0]:
                yield Fault("relative import", path, node.lineno, name)
            elif parts[0] in LIBRARY_OWNERS and owner not in LIBRARY_OWNERS[parts[0]]:
                yield Fault("library outside its package", path, node.lineno, name)
            elif name.startswith("megatron.training"):
                yield Fault("library outside its package", path, node.lineno, f"{name}: use megatron.core only")
            elif parts[0] == PACKAGE and len(parts) > 1 and parts[1] in LEVEL and owner not in ("__init__", parts[1]):
                if LEVEL[parts[1]] >= LEVEL.get(owner, -1):
                    yield Fault("import order", path, node.lineno, f"{owner} imports {parts[1]}, which is not below it")
    for path, tree in sources(root, KERNELS):
        for node, name in imported(tree):
            library = name.split(".")[0]
            if library not in {"torch", "triton", "oreal_kernels"} | sys.stdlib_module_names:
                yield Fault("library outside its package", path, node.lineno, name)


def import_cycles(root: Path) -> Iterator[Fault]:
    """Report each group of files that import each other, imports inside functions included."""
    trees = {module_name(path): (path, tree) for path, tree in sources(root)}
    graph = {module: set[str]() for module in trees}
    for module, (_, tree) in trees.items():
        for_types = imported_for_types(tree)
        for node, name in imported(tree):
            target = name if name in trees else name.rpartition(".")[0]
            if node not in for_types and target in trees and target != module:
                graph[module].add(target)
    for group in strongly_connected(graph):
        if len(group) > 1:
            path = trees[min(group)][0]
            yield Fault("import cycle", path, 1, " -> ".join(sorted(group)))


def layout(root: Path) -> Iterator[Fault]:
    """Report modules at the package root that belong into a package, unknown packages and long command files."""
    for path in sorted((root / PACKAGE).iterdir()):
        relative = str(path.relative_to(root))
        if path.suffix == ".py" and path.stem not in ROOT_MODULES:
            yield Fault("module at the package root", relative, 1, path.stem)
        if path.is_dir() and (path / "__init__.py").exists() and path.name not in LEVEL:
            yield Fault("package without a level", f"{relative}/__init__.py", 1, path.name)
    for path in sorted((root / PACKAGE / "cli").glob("*.py")):
        lines = path.read_text().count("\n")
        if lines > CLI_LINES:
            yield Fault("long command file", str(path.relative_to(root)), lines, f"{lines} lines, {CLI_LINES} allowed")


def class_names(root: Path) -> Iterator[Fault]:
    """Report public classes of one name in several files."""
    places = defaultdict(list)
    for path, tree in sources(root):
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append((path, node.lineno))
    for name, definitions in places.items():
        if len(definitions) > 1:
            files = ", ".join(path for path, _ in definitions)
            yield Fault("one class name in several files", *definitions[0], f"{name}: {files}")


def untyped_signatures(root: Path) -> Iterator[Fault]:
    """Report `Any` in public signatures and public fields of the packages in TYPED."""
    for path, tree in sources(root, PACKAGE):
        if path.removeprefix(f"{PACKAGE}/").startswith(TYPED):
            for node, name, annotation in public_annotations(tree):
                if "Any" in re.findall(r"\w+", ast.unparse(annotation)):
                    yield Fault("Any in a public signature", path, node.lineno, f"{name}: {ast.unparse(annotation)}")


def public_annotations(body: ast.Module | ast.ClassDef) -> Iterator[tuple[ast.stmt, str, ast.expr]]:
    """Yield statement, name and annotation of public functions' arguments and results and of public fields."""
    for node in body.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_annotations(node)
        elif (
            isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_")
        ):
            yield node, node.target.id, node.annotation
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name.startswith("_") and node.name not in ("__init__", "__call__", "__iter__", "__getitem__"):
                continue
            rules = node.args
            arguments = [*rules.posonlyargs, *rules.args, *rules.kwonlyargs, rules.vararg, rules.kwarg]
            yield from (
                (node, f"{node.name}({arg.arg})", arg.annotation) for arg in arguments if arg and arg.annotation
            )
            if node.returns:
                yield node, f"{node.name} returns", node.returns


def imported(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Yield each import statement with a dotted name it imports, function bodies included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


def imported_for_types(tree: ast.AST) -> set[ast.stmt]:
    """Return the import statements under `if TYPE_CHECKING`, which no cycle comes from."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return {statement for block in blocks for part in block.body for statement, _ in imported(part)}


def strongly_connected(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected components of a small graph, by reachability."""
    reach = {}
    for start in graph:
        seen, stack = set(), [start]
        while stack:
            for target in graph[stack.pop()]:
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
        reach[start] = seen
    groups, assigned = [], set()
    for start in sorted(graph):
        if start not in assigned:
            group = {start} | {other for other in reach[start] if start in reach[other]}
            assigned |= group
            groups.append(group)
    return groups


def module_name(path: str) -> str:
    """Return the dotted name of a file: a package's name for its __init__.py."""
    parts = path.removeprefix("kernels/").removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(path: str) -> str:
    """Return the package or root module that a file of oreal_megatron belongs to."""
    return path.split("/")[1].removesuffix(".py")


def first_line(text: str) -> str:
    """Return the first line of a text, shortened."""
    return text.splitlines()[0][:110]


def main() -> int:
    """Print the report; return 1 if there is anything in it."""
    prefixes = tuple(argument for argument in sys.argv[1:] if not argument.startswith("--"))
    limit = None if "--all" in sys.argv else 10
    rows = [fault for fault in faults(Path.cwd()) if not prefixes or fault.path.startswith(prefixes)]
    by_rule = defaultdict(list)
    for fault in rows:
        by_rule[fault.rule].append(fault)
    for rule, group in sorted(by_rule.items(), key=lambda item: -len(item[1])):
        print(f"{rule}: {len(group)}")
        print("\n".join(f"  {fault.path}:{fault.line}: {fault.text}" for fault in group[:limit]))
    print(f"style: {len(rows)} places to fix" if rows else "style: nothing to report")
    return 1 if rows else 0


if __name__ == "__main__":
    sys.exit(main())
