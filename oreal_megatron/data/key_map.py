"""Fields of a problem from the keys of a line: our names, those of benchmarks, or those that `data.keys` names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from oreal_megatron.config import ConfigError
from oreal_megatron.data.lines import Line

ALIASES = {"question": ("problem",), "gold_answer": ("answer",)}  # read without being named
# Last names of keys that other trainers use. They are suggested, never read by themselves: an `answer` beside a
# `solution` or a `label` beside a `target` may each mean another thing.
SUGGESTIONS = {
    "question": ("prompt", "query", "input", "instruction", "user"),
    "gold_answer": ("ground_truth", "gold", "final_answer", "expected_answer", "solution", "target", "label"),
    "response": ("completion", "output", "solution", "answer", "generation"),
}
OPTION = "--set data.keys."  # of commands with a recipe; names a field's key
MISSING = object()


def read_field(line: Line, field: str, keys: Mapping[str, str]) -> Any:
    """Return a field of a line: from the key that `keys` names if the line has it, else by our names; None without."""
    for key in (keys.get(field, field), field, *ALIASES.get(field, ())):
        value = _look_up(line, key)
        if value is not MISSING:
            return value
    return None


def question_and_system(name: str, value: Any) -> tuple[Any, str]:
    """Return the question, and the system message that comes with it; chat messages hold both.

    Raises ConfigError for messages other than one of the user, after at most one of the system.
    """
    if not isinstance(value, list):
        return value, ""
    roles = [message.get("role") if isinstance(message, dict) else None for message in value]
    if roles not in (["user"], ["system", "user"]) or not all(isinstance(part.get("content"), str) for part in value):
        raise ConfigError(
            f"{name} holds messages of {', '.join(map(str, roles)) or 'nobody'}; expected one of the user, after at "
            "most one of the system, each with a text as content"
        )
    return value[-1]["content"], value[0]["content"] if len(value) == 2 else ""


def describe_missing(name: str, line: Line, field: str) -> str:
    """Return a message about a line without a field: the keys that it has, and how to name the right one."""
    known = list(_key_paths(line))
    near = [key for word in SUGGESTIONS.get(field, ()) for key in known if key.rpartition(".")[2] == word]
    return (
        f"{name} has no value for {field!r}; its keys are {', '.join(known) or 'none'}. Name the right one with "
        f"{OPTION}{field}={near[0] if near else 'KEY'}"
    )


def _look_up(line: Line, path: str) -> Any:
    """Return the value at a path of keys with dots between them, MISSING if there is none."""
    if path in line:
        return line[path]
    first, dot, inner = path.partition(".")
    values = line.get(first)
    return _look_up(values, inner) if dot and isinstance(values, dict) else MISSING


def _key_paths(line: Line, path: str = "") -> Iterator[str]:
    for key, value in line.items():
        if isinstance(value, dict) and value:
            yield from _key_paths(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"
