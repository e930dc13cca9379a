"""Settle futures that may already be done, for example because their owner cancelled them: the first result stays."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from typing import TypeVar

Source = TypeVar("Source")
T = TypeVar("T")


def settle(future: Future[T], result: T) -> None:
    """Set the result of a future, unless it is done."""
    try:
        future.set_result(result)
    except InvalidStateError:
        pass


def fail(future: Future[T], error: BaseException) -> None:
    """Set the error of a future, unless it is done."""
    try:
        future.set_exception(error)
    except InvalidStateError:
        pass


def cancel(future: Future[T]) -> None:
    """Cancel a future and notify those who wait for it in concurrent.futures.wait."""
    if future.cancel():
        try:
            future.set_running_or_notify_cancel()
        except (InvalidStateError, RuntimeError):
            pass


def copy_failure(source: Future[Source], target: Future[T]) -> bool:
    """Copy the failure or cancellation of a done future to another; return False where it holds a result."""
    if source.cancelled():
        cancel(target)
    elif (error := source.exception()) is not None:
        fail(target, error)
    else:
        return False
    return True
