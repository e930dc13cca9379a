"""Building a Config from the outside: a recipe's name, `--set` overrides, the JSON of a run folder."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import re
import types
import typing
from pathlib import Path
from typing import Any

from oreal_megatron import config as configuration
from oreal_megatron.config import Config, ConfigError, schema


def from_recipe(name: str) -> Config:
    """Call the recipe function named `path/to/file.py:function` and return its Config."""
    path, _, function = name.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"recipe file {path} does not exist; a recipe is named path/to/file.py:function")
    spec = importlib.util.spec_from_file_location("recipe", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a recipe may do anything
        raise ConfigError(f"recipe file {path} cannot be run: {type(error).__name__}: {error}") from error
    recipes = [key for key, value in vars(module).items() if isinstance(value, types.FunctionType) and key[0] != "_"]
    if function not in recipes:
        raise ConfigError(f"{path} has no recipe {function!r}{nearest(function, recipes)}")
    config = _call(getattr(module, function), name)
    if not isinstance(config, Config):
        raise ConfigError(f"{name} returned {type(config).__name__}; a recipe returns oreal_megatron.config.Config")
    return from_dict(dataclasses.asdict(config))  # checks the type of every value


def _call(recipe: types.FunctionType, name: str) -> Any:
    """Call a recipe; an argument that no section has is told as any other unknown key."""
    try:
        return recipe()
    except TypeError as error:
        found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        section = found and getattr(configuration, found[1], None)
        if not section:
            raise
        fields = [field.name for field in dataclasses.fields(section)]
        raise ConfigError(f"{name}: {found[1]} has no key {found[2]!r}{nearest(found[2], fields)}") from None


def override(config: Config, assignments: list[str]) -> Config:
    """Apply `section.key=value` assignments; an unknown key is an error that names the nearest known one."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: wanted section.key=value")
        config = _replace(config, path.split("."), text, assignment)
    return config


def from_dict(data: dict[str, Any], kind: type = Config, where: str = "") -> Any:
    """The dataclass tree of a JSON object, as written by `dataclasses.asdict`."""
    if not isinstance(data, dict):
        raise ConfigError(f"configuration key {where[:-1]} is {data!r}; wanted a section")
    hints = typing.get_type_hints(kind)
    for key in data:
        if key not in hints:
            raise ConfigError(f"unknown configuration key {where}{key}{nearest(key, list(hints))}")
    return kind(**{key: _typed(value, hints[key], f"{where}{key}") for key, value in data.items()})


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Where two configurations, as dictionaries, are not equal: `section.key: old -> new`."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [f"{where[:-1]}: {before!r} -> {after!r}"]
    keys = [*before, *(key for key in after if key not in before)]
    return [line for key in keys for line in differences(before.get(key), after.get(key), f"{where}{key}.")]


def _replace(node: Any, path: list[str], text: str, assignment: str) -> Any:
    key, *rest = path
    if isinstance(node, dict):  # the megatron pass-through: its keys are checked by TransformerConfig
        return {**node, ".".join(path): _parse(text)}
    hints = typing.get_type_hints(type(node))
    if key not in hints:
        raise ConfigError(f"--set {assignment}: unknown key {key!r}{nearest(key, list(hints))}")
    value = getattr(node, key)
    if rest and not (dataclasses.is_dataclass(value) or isinstance(value, dict)):
        raise ConfigError(f"--set {assignment}: {key} is a value, it has no key {rest[0]!r}")
    if not rest and dataclasses.is_dataclass(value):
        raise ConfigError(f"--set {assignment}: {key} is a section; name one of {', '.join(vars(value))}")
    # A name like 2024_01 or 1e5 is a text where a text is wanted.
    plain = text if hints[key] is str else _parse(text)
    new = _replace(value, rest, text, assignment) if rest else _typed(plain, hints[key], assignment.partition("=")[0])
    return dataclasses.replace(node, **{key: new})


def _parse(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a bare word is a string
        return {"true": True, "false": False}.get(text, text)


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Convert a value to its annotated type: dictionaries become sections, lists tuples, integers floats."""
    if dataclasses.is_dataclass(hint):
        return from_dict(value, hint, f"{where}.")
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
    elif isinstance(value, int) and not isinstance(value, bool) and float in (hint, *typing.get_args(hint)):
        value = float(value)
    elif hint is str and not isinstance(value, dict | list | tuple):
        value = str(value)
    if problem := schema.type_problem(where, value, hint):
        raise ConfigError(problem)
    return value


def nearest(key: str, known: list[str]) -> str:
    """The end of a sentence about an unknown key: the nearest known one, or all of them."""
    close = difflib.get_close_matches(key, known, 1, 0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
