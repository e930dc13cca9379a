"""Stand-ins for the tokens, log-probs and text of a rollout on ranks whose replica did not generate it.

A step of 128 ranks can have hundreds of megabytes of tokens and texts, of which a rank needs its own rollouts and the
samples that it trains. Of all others it knows the number of tokens; runtime/rollout_exchange.py brings what it needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from oreal_megatron.records import Rollout


class RemoteValueRead(RuntimeError):
    """A value was read on a rank that does not have it: a fault of the program."""


@dataclass(frozen=True, slots=True)
class RemoteValues(Sequence[Any]):
    """Values of a rollout that are on another replica: their number is known, and reading them raises.

    Slices, and sums with tuples or others of their kind, are of known number too.
    """

    name: str  # "tokens", "log-probs", "text"
    rollout: tuple[int, int]  # slot and index
    replica: int  # that generated it
    size: int | None  # None: not known either

    def read(self) -> NoReturn:
        """Raise RemoteValueRead."""
        raise RemoteValueRead(
            f"the {self.name} of rollout {self.rollout} were read on a rank that does not have them: they are on "
            f"replica {self.replica}, which generated it. Fetch them first (runtime/rollout_exchange.py)"
        )

    def __len__(self) -> int:
        return self.read() if self.size is None else self.size

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            self.read()
        return dataclasses.replace(self, size=len(range(*index.indices(len(self)))))

    def __add__(self, other: Sequence[Any]) -> RemoteValues:
        return dataclasses.replace(self, size=len(self) + len(other))

    __radd__ = __add__

    def __str__(self) -> str:
        self.read()


def remote_tokens(rollout: Rollout, replica: int, count: int) -> tuple[int, ...]:
    """Return a stand-in for so many tokens of a rollout."""
    return cast("tuple[int, ...]", RemoteValues("tokens", rollout.key, replica, count))


def remote_logprobs(rollout: Rollout, replica: int, count: int) -> tuple[float, ...]:
    """Return a stand-in for so many log-probs of a rollout."""
    return cast("tuple[float, ...]", RemoteValues("log-probs", rollout.key, replica, count))


def remote_text(rollout: Rollout, replica: int) -> str:
    """Return a stand-in for the text of a rollout."""
    return cast("str", RemoteValues("text", rollout.key, replica, None))


def without_values(rollout: Rollout, replica: int) -> Rollout:
    """Return a rollout of another replica with stand-ins in place of its values."""
    return dataclasses.replace(
        rollout,
        tokens=remote_tokens(rollout, replica, len(rollout.tokens)),
        logprobs=rollout.logprobs and remote_logprobs(rollout, replica, len(rollout.logprobs)),
        text=remote_text(rollout, replica),
    )


def is_local(values: Sequence[Any] | None) -> bool:
    """Return whether values can be read on this rank."""
    return not isinstance(values, RemoteValues)
