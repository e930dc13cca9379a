"""Differences between two configurations of one run, by what a resumed run does with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from oreal_megatron.config.errors import ConfigError
from oreal_megatron.config.root import Config
from oreal_megatron.config.schema import OnResume, config_keys


class Change(NamedTuple):
    """A key with another value than before."""

    path: str
    before: object
    after: object
    on_resume: OnResume

    def __str__(self) -> str:
        return f"{self.path}: {self.before!r} -> {self.after!r}"


def changes(before: Config, after: Config) -> list[Change]:
    """Return the keys whose values differ, in the order of declaration."""
    pairs = zip(config_keys(before), config_keys(after), strict=True)
    return [Change(old.path, old.value, new.value, new.on_resume) for old, new in pairs if old.value != new.value]


def refuse_fixed(run: str, differing: Sequence[Change]) -> None:
    """Raise ConfigError if a key that has one value for an entire run has another."""
    fixed = [change for change in differing if change.on_resume == "fixed"]
    if fixed:
        old = " ".join(f"--set {change.path}={change.before}" for change in fixed)
        raise ConfigError(
            f"{run} cannot be resumed with {', '.join(map(str, fixed))}: fixed for an entire run. Resume it with the "
            f"old values ({old}), or start a new run with --set run=FOLDER"
        )
