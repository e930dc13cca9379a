"""Shared by both directions: reading ahead while writing, and outputs that get their name when complete."""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from oreal_megatron.config import ConfigError
from oreal_megatron.runtime import files

AHEAD_BYTES = 512 * 2**20  # read but not yet written; the item being read and the one being written are extra
BLOCK_BYTES = 128 * 2**20  # rows of vocabulary tensors that are processed at once
UNFINISHED = "unfinished_conversion"  # file in the folder of a conversion that has not finished
SLACK_BYTES = 64 * 2**20  # beyond the tensors: headers, tokenizer, metadata

Report = Callable[[str], None]  # receives messages to the user
Advance = Callable[[int], None]  # receives the bytes of each tensor written
Item = TypeVar("Item")


def read_ahead(items: Iterator[tuple[int, Item]], budget: int = AHEAD_BYTES) -> Iterator[Item]:
    """Yield the items of (bytes, item) from a thread that stays `budget` bytes ahead; its errors are raised here."""
    ready: queue.Queue[tuple[int, Any]] = queue.Queue()
    changed, state = threading.Condition(), {"waiting": 0, "stopped": False}

    def produce() -> None:
        try:
            for size, item in items:
                ready.put((size, item))
                with changed:
                    state["waiting"] += size
                    changed.wait_for(lambda: state["waiting"] < budget or state["stopped"])
                if state["stopped"]:
                    return
            ready.put((0, None))
        except BaseException as error:
            ready.put((-1, error))

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while (entry := ready.get()) != (0, None):
            size, item = entry
            if size < 0:
                raise item
            del entry  # else the item would stay in memory while the next one is awaited
            yield item
            del item
            with changed:
                state["waiting"] -= size
                changed.notify()
    finally:
        with changed:
            state["stopped"] = True
            changed.notify()
        thread.join()


@contextlib.contextmanager
def write_atomically(path: Path, size: int, report: Report, replace: bool = False) -> Iterator[Path]:
    """Provide a folder to write `size` bytes into; it gets the name `path` when everything is on the disk.

    An error removes the folder. Raises ConfigError where `path` exists or cannot be made (unless `replace`, for the
    folders of a run) or the disk is too small (not checked for a size of 0).
    """
    partial = path.with_name(path.name + ".partial")
    if path.exists() and not replace:
        raise ConfigError(f"{path} exists already; delete it or name another output")
    if partial.exists():
        if not replace and not (partial / UNFINISHED).is_file():
            raise ConfigError(f"{partial}, under whose name {path.name} is written first, is something else; move it")
        report(f"{partial} remains of a conversion that did not finish; it is deleted")
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
        (partial / UNFINISHED).touch()
    except OSError as error:
        if replace:
            raise
        raise ConfigError(f"{path} cannot be made ({error.strerror}); name another output") from None
    try:
        free, needed = shutil.disk_usage(partial).free, size + SLACK_BYTES if size else 0
        if free < needed:
            raise ConfigError(
                f"{path} needs {needed / 2**20:.0f} MiB, the disk has {free / 2**20:.0f} MiB free; free some space"
            )
        yield partial
        (partial / UNFINISHED).unlink()
        for file in [*partial.rglob("*"), partial]:
            files.sync(file)
    except BaseException:
        shutil.rmtree(partial)
        raise
    if path.exists():
        former = path.with_name(path.name + ".former.partial")
        path.rename(former)
        partial.rename(path)
        shutil.rmtree(former)
    else:
        partial.rename(path)
    files.sync(path.parent)


class Cast:
    """Conversion to one dtype, or to none; counts the values that it changed."""

    def __init__(self, dtype: torch.dtype | None):
        self.dtype, self.changed, self.values = dtype, 0, 0

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a tensor of `dtype` is converted to."""
        return self.dtype or dtype

    def __call__(self, tensor: Tensor) -> Tensor:
        """Convert a tensor."""
        if self.dtype is None or self.dtype is tensor.dtype:
            return tensor
        result = tensor.to(self.dtype)
        self.values += tensor.numel()
        self.changed += int((result.to(tensor.dtype) != tensor).sum())
        return result

    def summary(self) -> str:
        """Return a message on the values converted, empty when there were none."""
        if not self.values:
            return ""
        loss = f"lossy: {self.changed:,} changed" if self.changed else "none changed"
        return f"cast {self.values:,} values to {str(self.dtype).removeprefix('torch.')}, {loss}"
