"""Declaration of configuration keys and the check of a configuration against it.

The keys are in algorithm.py, system.py and root.py.

A field declares its type (`Literal` for choices) and a `Key` with its meaning and bounds:

    lr: Annotated[float, Key("peak learning rate", low=0.0, high=10.0)] = 5e-7

The class of the declaration says what a resumed run does with another value: `Key` announces it and uses it, `FixedKey`
refuses it, `InputKey` refuses other contents, `FreeKey` uses it without a word. A `FunctionKey` names a function of the
user with its arguments; config/user_functions.py reads it.

Rules that connect several keys are methods named `conflicts` of the section that holds them. Error messages,
`oreal config` and docs/reference/config.md are all made from these declarations.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from oreal_megatron.config.errors import ConfigError

TYPE_NAMES = {int: "int", float: "float", bool: "bool", str: "str", type(None): "None"}
UNIONS = (types.UnionType, typing.Union)  # as `int | None` and as `Optional[int]`
PLAIN_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


# What a resumed run does with a value that differs from the one before.
OnResume = Literal["announced", "fixed", "fixed content", "free"]


@dataclass(frozen=True)
class Key:
    """Meaning, bounds (inclusive; None: no bound) and unit of a key that a resumed run may change.

    The results then differ from those of the uninterrupted run, so the change is announced.
    """

    on_resume: ClassVar[OnResume] = "announced"

    meaning: str
    low: float | None = None
    high: float | None = None
    unit: str = ""

    @property
    def bounds(self) -> str:
        """The bounds in words, empty where there are none."""
        unit = f" {self.unit}" if self.unit else ""
        if self.low is not None and self.high is not None:
            return f"{format_number(self.low)} to {format_number(self.high)}{unit}"
        if self.low is not None:
            return f"at least {format_number(self.low)}{unit}"
        return "" if self.high is None else f"at most {format_number(self.high)}{unit}"


class FixedKey(Key):
    """Key with one value for an entire run: with another, it would be another run."""

    on_resume = "fixed"


class InputKey(Key):
    """Path of an input whose content is fixed for a run, wherever it lies."""

    on_resume = "fixed content"


@dataclass(frozen=True)
class FunctionKey(Key):
    """Name of a user's function, path/to/file.py:NAME or package.module:NAME; `arguments` are what it is called with.

    The file and the name are fixed for a run, wherever the file lies.
    """

    on_resume: ClassVar[OnResume] = "fixed content"

    arguments: tuple[str, ...] = ()


class ObserverKey(FunctionKey):
    """Name of a user's function on whose result no training depends."""

    on_resume = "free"


class FreeKey(Key):
    """Key on which the results do not depend: names, retention, memory, time limits."""

    on_resume = "free"


@dataclass(frozen=True)
class Section:
    """Base class of the sections of a configuration."""

    on_resume: ClassVar[OnResume | None] = None  # of all keys of the section, whatever their own

    def __post_init__(self) -> None:
        """Replace functions that a recipe gives as objects by their names, which a resumed run reads."""
        for name, value in vars(self).items():
            if isinstance(value, types.FunctionType) and isinstance(
                _declaration(hints(type(self))[name])[1], FunctionKey
            ):
                object.__setattr__(self, name, function_name(name, value))

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield a message for each rule between several keys that is broken; `path` is the section's, with a dot."""
        return iter(())


@dataclass(frozen=True)
class ConfigKey:
    """One key of a configuration: declaration, value and default."""

    path: str
    hint: Any
    key: Key
    value: object
    default: object
    on_resume: OnResume

    @property
    def type_name(self) -> str:
        """The type as a user writes it."""
        return type_name(self.hint)

    def problem(self) -> str | None:
        """Return a message if type, choice or bounds are violated."""
        return type_problem(self.path, self.value, self.hint) or self._bound_problem()

    def _bound_problem(self) -> str | None:
        value, low, high = self.value, self.key.low, self.key.high
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        if not math.isfinite(value):
            return f"{self.path} is {value}; expected a finite number, {self.key.bounds} ({self.key.meaning})"
        if (low is None or low <= value) and (high is None or value <= high):
            return None
        return f"{self.path} is {format_number(value)}; expected {self.key.bounds} ({self.key.meaning})"


def function_name(key: str, function: types.FunctionType) -> str:
    """Return path/to/file.py:NAME of a function; raise ConfigError for one that cannot be read by its name."""
    name = function.__name__
    if function.__globals__.get(name) is not function:  # a lambda, a function inside of another, a decorated one
        raise ConfigError(
            f"{key} is the function {name!r}, which a resumed run cannot read by its name; define it with `def` at the "
            "top level of a file"
        )
    return f"{function.__code__.co_filename}:{name}"


def config_keys(
    section: Section, default: Section | None = None, path: str = "", on_resume: OnResume | None = None
) -> Iterator[ConfigKey]:
    """Yield all keys of a section and of the sections in it, in the order of declaration.

    `on_resume` is that of a section around this one, and overrules the keys.
    """
    default = type(section)() if default is None else default
    on_resume = on_resume or section.on_resume
    for name, hint in hints(type(section)).items():
        value, usual = getattr(section, name), getattr(default, name)
        if isinstance(value, Section):
            yield from config_keys(value, usual, f"{path}{name}.", on_resume)
        else:
            plain, key = _declaration(hint)
            yield ConfigKey(f"{path}{name}", plain, key, value, usual, on_resume or key.on_resume)


def sections(section: Section, path: str = "") -> Iterator[tuple[str, Section]]:
    """Yield the path (with a dot at its end) and the value of a section and of all sections in it."""
    yield path, section
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, Section):
            yield from sections(value, f"{path}{field.name}.")


def problems(section: Section, path: str = "") -> list[str]:
    """Return a message for each key that is out of its bounds; if there are none, for each broken rule between keys.

    `path`: of the section in the configuration, with a dot at its end.
    """
    single = [problem for key in config_keys(section, path=path) if (problem := key.problem())]
    return single or [message for inner, part in sections(section, path) for message in part.conflicts(inner)]


def validate(section: Section, path: str = "") -> None:
    """Raise ConfigError if a key or a rule between keys is violated; `path` as above."""
    messages = problems(section, path)
    if len(messages) > 1:
        raise ConfigError("\n  ".join([f"the configuration has {len(messages)} problems:", *messages]))
    if messages:
        raise ConfigError(messages[0])


def hints(kind: type[Section]) -> dict[str, Any]:
    """Return the annotation of each field of a section."""
    fields = {field.name for field in dataclasses.fields(kind)}
    return {name: hint for name, hint in typing.get_type_hints(kind, include_extras=True).items() if name in fields}


def plain_hint(hint: Any) -> Any:
    """Return an annotation without its `Key`."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def type_problem(path: str, value: object, hint: Any) -> str | None:
    """Return a message if the value has another type than annotated, or is none of the choices."""
    if _accepts(value, hint):
        return None
    if typing.get_origin(hint) is Literal:
        return f"{path} is {value!r}; expected one of {type_name(hint).replace(' | ', ', ')}"
    example = f", for example {(value,)!r}" if _accepts((value,), hint) else ""  # one item, without its parentheses
    return f"{path} is {value!r}; expected {PLAIN_TYPES.get(hint, type_name(hint))}{example}"


def type_name(hint: Any) -> str:
    """Return an annotation as a user writes values of it: choices by their names, tuples with their items."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(str(choice) or "''" for choice in args)
    if origin in UNIONS:
        return " | ".join(map(type_name, args))
    if origin is tuple:
        return f"tuple of {type_name(args[0])}" if args[-1] is Ellipsis else f"({', '.join(map(type_name, args))})"
    if origin is list:
        return f"list of {type_name(args[0])}"
    return "dict" if origin is dict else TYPE_NAMES.get(hint, str(hint))


def format_number(number: float) -> str:
    """Return a number in its shortest usual form that is still this number."""
    if number == round(number) and abs(number) < 1e15:
        return str(round(number))
    return short if float(short := f"{number:g}") == number else repr(number)


def _declaration(hint: Any) -> tuple[Any, Key]:
    args = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
    keys = [extra for extra in args[1:] if isinstance(extra, Key)]
    return args[0], keys[0] if keys else Key("")


def _accepts(value: object, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin in UNIONS:
        return any(_accepts(value, choice) for choice in args)
    if origin is list:
        return isinstance(value, list) and all(_accepts(item, args[0]) for item in value)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        items = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(items) == len(value) and all(map(_accepts, value, items))
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, origin or hint)
