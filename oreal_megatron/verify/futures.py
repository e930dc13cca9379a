"""Setting a future that its owner may have given up on: whoever comes second finds it done, and nothing is raised."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from typing import Any


def settle(future: Future, result: Any) -> None:
    try:
        future.set_result(result)
    except InvalidStateError:
        pass


def fail(future: Future, error: BaseException) -> None:
    try:
        future.set_exception(error)
    except InvalidStateError:
        pass


def cancel(future: Future) -> None:
    """Cancels, and tells those who wait in concurrent.futures.wait as well."""
    if future.cancel():
        try:
            future.set_running_or_notify_cancel()
        except (InvalidStateError, RuntimeError):
            pass


def follow(future: Future, done: Future) -> bool:
    """Hands on the failure or cancellation of `done`; False where `done` holds a result."""
    if done.cancelled():
        cancel(future)
    elif (error := done.exception()) is not None:
        fail(future, error)
    else:
        return False
    return True
