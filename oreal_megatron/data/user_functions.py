"""Functions of the user that make prompts: `data.reader`, rows of a path, and `data.template`, the text of a prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

from oreal_megatron.config import ConfigError
from oreal_megatron.config.user_functions import read_function
from oreal_megatron.data.lines import Line

# Path -> number and values of each row.
Reader = Callable[[str], Iterator[tuple[int, Line]]]
# Question and system message ("" without one) -> text up to the start of the response.
Template = Callable[[str, str], str]


@functools.lru_cache(maxsize=8)
def reader(name: str) -> Reader | None:
    """Return the function that `data.reader` names, with checks of its rows; None without one."""
    if not name:
        return None
    function = read_function(name, "data.reader", ("path",))

    def read(path: str) -> Iterator[tuple[int, Line]]:
        number = 0
        for number, row in enumerate(_rows(function, path, name), 1):
            if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
                raise ConfigError(
                    f"data.reader {name} gave {row!r:.200} as row {number} of {path}; expected a dictionary such as "
                    "{'question': ..., 'gold_answer': ...}"
                )
            yield number, dict(row)
        if not number:
            raise ConfigError(f"data.reader {name} gave no rows of {path}; expected at least one")

    return read


def _rows(function: Callable[[str], Iterable[object]], path: str, name: str) -> Iterator[object]:
    try:
        yield from function(path)
    except Exception as error:  # the user's function may do anything
        raise ConfigError(f"data.reader {name} failed on {path}: {type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=8)
def template(name: str) -> Template | None:
    """Return the function that `data.template` names, with a check of its texts; None without one."""
    if not name:
        return None
    function = read_function(name, "data.template", ("question", "system_prompt"))

    def render(question: str, system_prompt: str) -> str:
        try:
            text = function(question, system_prompt)
        except Exception as error:  # the user's function may do anything
            raise ConfigError(f"data.template {name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(text, str):
            raise ConfigError(f"data.template {name} returned {type(text).__name__}; expected the text of the prompt")
        return text

    return render
