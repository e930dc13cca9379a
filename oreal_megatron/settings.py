"""Read a Config from the outside: a recipe, `--set` assignments, config.json of a run folder."""

from __future__ import annotations

import ast
import dataclasses
import typing
from typing import Any, TypeVar

from oreal_megatron.config import Config, ConfigError, Section, schema
from oreal_megatron.config.recipe_files import read_recipe
from oreal_megatron.config.suggestions import suggest, suggest_keys

SectionType = TypeVar("SectionType", bound=Section)

# Keys of 0.1.0 and their names since 0.2.0; config.json of an older run folder is read with it.
RENAMED: dict[str, tuple[str, ...]] = {
    "data.drop_bad_golds": ("data.drop_unreadable_golds",),
    "engine.buffer_megabytes": ("engine.buffer_mib",),
    "engine.kv_cache_gb": ("engine.kv_cache_gib",),
    "engine.proof_answers": ("engine.parity_rollouts",),
    "engine.proof_tokens": ("engine.parity_tokens",),
    "engine.proof_tolerance": ("engine.parity_tolerance_nats",),
    "guard.skips_in_a_row": ("guard.max_consecutive_skips",),
    "model.logits_megabytes": ("model.logits_mib",),
    "sampling.answers_per_prompt": ("sampling.rollouts_per_prompt",),
    "verify.memory_mb": ("verify.memory_mib",),
    "weights.threshold": ("weights.threshold_correct", "weights.threshold_incorrect"),
}


def from_recipe(name: str) -> Config:
    """Return the Config of the recipe `path/to/file.py:function`, with the type of every value checked."""
    return from_dict(dataclasses.asdict(read_recipe(name)))


def load(recipe: str, assignments: list[str]) -> Config:
    """Return the Config of a recipe with `--set` assignments applied."""
    return override(from_recipe(recipe), assignments)


def override(config: Config, assignments: list[str]) -> Config:
    """Apply `section.key=value` assignments; an unknown key is an error that names the nearest known ones."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: expected section.key=value")
        if path in RENAMED:
            raise ConfigError(f"--set {assignment}: {path} is named {' and '.join(RENAMED[path])} since 0.2.0")
        try:
            config = _assign(config, path.split("."), text, path)
        except KeyError:
            raise ConfigError(f"--set {assignment}: unknown key {path!r}{suggest_keys(path, config)}") from None
        except ConfigError as error:
            raise ConfigError(f"--set {assignment}: {error}") from None
    return config


def from_dict(data: dict[str, Any]) -> Config:
    """Return the Config of a dictionary, as written to config.json, keys of 0.1.0 included."""
    return _section(with_current_names(data), Config, "")


def with_current_names(data: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration dictionary with the keys of 0.1.0 renamed, in the same order, and its rules named.

    A run folder of 0.1.0 has the key `weights.threshold`. Rules that have changed since are keys now, so that such a
    run continues as it began.
    """
    if "threshold" in _section_of(data, "weights"):
        data = {"policy_schedule": "updates"} | data
        data["reward_model"] = {"head_init": "normal"} | _section_of(data, "reward_model")
        if _section_of(data, "selection").get("keep") == "all":
            data["selection"] = _section_of(data, "selection") | {"keep": "mixed"}
    return {
        section: {new: value for key, value in values.items() for new in _current_names(section, key)}
        if isinstance(values, dict)
        else values
        for section, values in data.items()
    }


def _section_of(data: dict[str, Any], name: str) -> dict[str, Any]:
    section = data.get(name)
    return section if isinstance(section, dict) else {}


def _current_names(section: str, key: str) -> list[str]:
    return [name.rpartition(".")[2] for name in RENAMED.get(f"{section}.{key}", (key,))]


def _section(data: Any, kind: type[SectionType], path: str) -> SectionType:
    if not isinstance(data, dict):
        raise ConfigError(f"configuration key {path[:-1]} is {data!r}; expected a section")
    hints = schema.hints(kind)
    for key in data:
        if key not in hints:
            raise ConfigError(f"unknown configuration key {path}{key}{suggest(key, list(hints))}")
    return kind(**{key: _typed(value, schema.plain_hint(hints[key]), f"{path}{key}") for key, value in data.items()})


def _assign(section: SectionType, keys: list[str], text: str, path: str) -> SectionType:
    """Return a section with one value replaced; raises KeyError for an unknown key."""
    key, *inner = keys
    hint, value = schema.plain_hint(schema.hints(type(section))[key]), getattr(section, key)
    new: Any
    if inner and isinstance(value, dict):  # further fields of TransformerConfig, checked by it
        new = {**value, ".".join(inner): _parse(text)}
    elif inner and isinstance(value, Section):
        new = _assign(value, inner, text, path)
    elif inner:
        raise ConfigError(f"{key} is a value, it has no key {inner[0]!r}")
    elif isinstance(value, Section):
        raise ConfigError(f"{key} is a section; name one of {', '.join(vars(value))}")
    else:  # a name like 2024_01 or 1e5 stays a text where a text is expected
        new = _typed(text if hint is str else _parse(text), hint, path)
    return dataclasses.replace(section, **{key: new})


def _parse(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a bare word is a text
        return {"true": True, "false": False}.get(text, text)


def _typed(value: Any, hint: Any, path: str) -> Any:
    """Convert a value to its annotated type: dictionaries become sections, lists tuples, integers floats."""
    if isinstance(hint, type) and issubclass(hint, Section):
        return _section(value, hint, f"{path}.")
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
    elif isinstance(value, int) and not isinstance(value, bool) and float in (hint, *typing.get_args(hint)):
        value = float(value)
    elif hint is str and not isinstance(value, dict | list | tuple):
        value = str(value)
    if problem := schema.type_problem(path, value, hint):
        raise ConfigError(problem)
    return value
