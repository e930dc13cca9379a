"""Functions of the user that settings name: path/to/file.py:NAME or package.module:NAME; and the text of such files."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oreal_megatron.config.errors import ConfigError
from oreal_megatron.config.recipe_files import execute, importable_folder
from oreal_megatron.config.root import Config
from oreal_megatron.config.schema import FunctionKey, config_keys


@dataclass(frozen=True)
class Source:
    """Text of a Python file that a run depends on."""

    name: str  # as the user gave it, with the function
    path: str
    digest: str  # of the function's name and of the text
    text: str


@dataclass(frozen=True)
class Origin:
    """Start of a run as the user wrote it: the command line, and the recipe if it names one."""

    command: str = ""
    recipe: Source | None = None


def read_source(name: str) -> Source:
    """Return the file of `path/to/file.py:NAME` or `package.module:NAME`; raise ConfigError if there is none."""
    path, _, function = name.partition(":")
    if not path.endswith(".py") and not Path(path).is_file():
        path = _file_of_module(path)
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: the file {path} cannot be read ({error})") from None
    digest = hashlib.blake2b(f"{function} {text}".encode(), digest_size=16).hexdigest()
    return Source(name, str(Path(path).resolve()), digest, text)


def _file_of_module(module: str) -> str:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise ConfigError(f"{module} is neither a file that ends in .py nor a Python module that can be imported")
    return spec.origin


def function_keys(config: Config) -> Iterator[tuple[str, FunctionKey, str]]:
    """Yield path, declaration and value of each setting that names a function."""
    for key in config_keys(config):
        if isinstance(key.key, FunctionKey) and key.value:
            yield key.path, key.key, str(key.value)


def sources(config: Config) -> dict[str, Source]:
    """Return the files of all functions that a configuration names, by their keys."""
    return {path: read_source(name) for path, _, name in function_keys(config)}


def check_functions(config: Config) -> None:
    """Raise ConfigError for the first named function that is missing or takes other arguments."""
    for path, key, name in function_keys(config):
        read_function(name, path, key.arguments)


def read_function(name: str, key: str, arguments: tuple[str, ...]) -> Callable[..., Any]:
    """Return the function `path/to/file.py:NAME` or `package.module:NAME`. A file is executed as a recipe is.

    Raises ConfigError, naming the configuration key, where there is no such function of these arguments.
    """
    path, _, function = name.partition(":")
    expected = f"{key} is {name!r}; expected path/to/file.py:NAME, a function of ({', '.join(arguments)})"
    if not function:
        raise ConfigError(f"{expected}; NAME is missing")
    if path.endswith(".py") and not Path(path).is_file():
        raise ConfigError(f"{expected}; the file {path} does not exist")
    value = getattr(_load(path, expected), function, None)
    if not isinstance(value, types.FunctionType):
        raise ConfigError(f"{expected}; {path} has no function {function!r}")
    try:
        inspect.signature(value).bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"{expected}; with these {len(arguments)} arguments: {error}") from None
    return value


@functools.cache
def _execute_once(path: str, content: bytes) -> types.ModuleType:
    """Execute a file; settings that name functions of one file share its module, until its content changes."""
    with importable_folder(Path(path).parent):
        return execute(path)


def _load(path: str, expected: str) -> types.ModuleType:
    if path.endswith(".py"):
        return _execute_once(str(Path(path).resolve()), Path(path).read_bytes())
    try:
        return importlib.import_module(path)
    except Exception as error:  # a module of the user may do anything
        raise ConfigError(f"{expected}; {path} cannot be imported ({type(error).__name__}: {error})") from error
