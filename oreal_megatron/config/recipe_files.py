"""Recipe files: Python files with functions that return a Config."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from oreal_megatron import config as configuration
from oreal_megatron.config.errors import ConfigError
from oreal_megatron.config.root import Config
from oreal_megatron.config.suggestions import suggest

MODULE = "oreal_recipe"  # name under which the file is executed
PACKAGES = ("oreal_megatron", "oreal_kernels")


def read_recipe(name: str) -> Config:
    """Call the recipe `path/to/file.py:function`; `:function` may be left out if the file has only one."""
    path, _, function = name.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"recipe file {path} does not exist; a recipe is named path/to/file.py:function")
    modules = set(sys.modules)
    with importable_folder(Path(path).resolve().parent):
        module = execute(path)
        config = _call(_choose(module, path, function), name)
    beside = {MODULE, *(set(sys.modules) - modules)}
    if patched := next(_patches(beside), None):
        raise ConfigError(
            f"recipe {name} replaces {patched}, which a resumed run would not do: it reads config.json, not the "
            "recipe. Name a function in a setting instead (docs/how_to/extensions.md), or change the package itself"
        )
    return config


@contextlib.contextmanager
def importable_folder(folder: Path) -> Iterator[None]:
    """Let a recipe import the modules beside it, as Python lets a script."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def execute(path: str) -> types.ModuleType:
    """Execute a Python file as a module of its own; an exception in it becomes ConfigError."""
    if Path(path).suffix != ".py":
        raise ConfigError(
            f"recipe file {path} is no Python file; expected file.py:function, a function that returns a Config "
            "(docs/start/first_recipe.md)"
        )
    module = types.ModuleType(MODULE)
    module.__file__ = path
    sys.modules[MODULE] = module  # dataclasses look up the module of their class
    try:
        exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), vars(module))
    except Exception as error:  # a recipe may do anything
        raise ConfigError(f"recipe file {path} cannot be run: {_describe(error, path)}") from error
    return module


def _describe(error: Exception, path: str) -> str:
    """Return type, message and line of an error in a recipe file, with a hint for names of 0.1.0."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = f" (line {lines[-1]})" if lines else ""
    hint = ""
    if isinstance(error, ImportError) and error.name == configuration.__name__:
        hint = "; since 0.2.0 the sections' names end in Config, e.g. LossConfig"
    return f"{type(error).__name__}: {error}{line}{hint}"


def _choose(module: types.ModuleType, path: str, function: str) -> Callable[[], object]:
    recipes = recipe_functions(module)
    if not function and len(recipes) == 1:
        return recipes[0]
    named = getattr(module, function, None) if function and not function.startswith("_") else None
    if isinstance(named, types.FunctionType):
        return named
    names = [recipe.__name__ for recipe in recipes]
    if not names:
        raise ConfigError(f"{path} has no recipe: define a function without arguments that returns a Config")
    if not function:
        raise ConfigError(
            f"{path} has {len(names)} recipes; name one, e.g. {path}:{names[0]}; known are {', '.join(names)}"
        )
    raise ConfigError(f"{path} has no recipe {function!r}{suggest(function, names)}")


def recipe_functions(module: types.ModuleType) -> list[types.FunctionType]:
    """Return the public functions defined in a recipe file that take no required argument and may return a Config."""
    return [value for name, value in vars(module).items() if not name.startswith("_") and _is_recipe(value, module)]


def _is_recipe(value: object, module: types.ModuleType) -> bool:
    if not isinstance(value, types.FunctionType) or value.__module__ != module.__name__:
        return False
    signature = inspect.signature(value)
    returned = str(getattr(signature.return_annotation, "__name__", signature.return_annotation)).rpartition(".")[2]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p for p in signature.parameters.values() if p.default is p.empty and p.kind not in variable]
    return not required and returned in ("Config", "_empty")


def _call(recipe: Callable[[], object], name: str) -> Config:
    """Call a recipe; a key that a section does not have becomes a message with the nearest ones."""
    try:
        config = recipe()
    except ConfigError:
        raise
    except Exception as error:  # a recipe may do anything
        match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        section = getattr(configuration, match[1], None) if match else None
        if match and section:
            fields = [field.name for field in dataclasses.fields(section)]
            raise ConfigError(f"{name}: {match[1]} has no key {match[2]!r}{suggest(match[2], fields)}") from None
        raise ConfigError(f"recipe {name} failed: {_describe(error, name.partition(':')[0])}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{name} returned {type(config).__name__}; a recipe returns oreal_megatron.config.Config")
    return config


def _patches(names: set[str]) -> Iterator[str]:
    """Yield the attributes of this project's packages that functions or classes of other modules have replaced.

    `names`: modules that a recipe brought in. Replaced constants are not recognised.
    """
    foreign = {name for name in names if name.partition(".")[0] not in PACKAGES}
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] not in PACKAGES:
            continue
        for key, value in list(vars(module).items()):
            inner = vars(value) if isinstance(value, type) and value.__module__ == name else value
            for attribute, part in list(inner.items()) if isinstance(inner, Mapping) else [("", value)]:
                if _module_of(part) in foreign:
                    yield f"{name}.{key}.{attribute}" if attribute else f"{name}.{key}"


def _module_of(value: object) -> str | None:
    """Return the module that defines a function or class, also one behind a decorator of Python's own."""
    for name in ("__func__", "fget", "func"):
        value = getattr(value, name, value)
    return value.__module__ if isinstance(value, type | types.FunctionType) else None
