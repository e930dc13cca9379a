"""What both directions share: reading ahead while writing, and outputs that have their name only when complete."""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oreal_megatron.config import ConfigError
from oreal_megatron.runtime import files

AHEAD_BYTES = 512 * 2**20  # read and not yet written; the piece being read and the one being written come on top
BLOCK_BYTES = 128 * 2**20  # rows of vocabulary tensors that are handled at once
SLACK_BYTES = 64 * 2**20  # beyond the tensors: headers, tokenizer, metadata

Say = Callable[[str], None]
Advance = Callable[[int], None]  # told the bytes of every tensor written


def ahead(pieces: Iterator[tuple[int, Any]], budget: int = AHEAD_BYTES) -> Iterator[Any]:
    """The pieces of (bytes, piece), produced in a thread that stays `budget` bytes ahead; its errors come through."""
    ready: queue.Queue = queue.Queue()
    room, state = threading.Condition(), {"waiting": 0, "stopped": False}

    def produce() -> None:
        try:
            for size, piece in pieces:
                ready.put((size, piece))
                with room:
                    state["waiting"] += size
                    room.wait_for(lambda: state["waiting"] < budget or state["stopped"])
                if state["stopped"]:
                    return
            ready.put((0, None))
        except BaseException as error:
            ready.put((-1, error))

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while (got := ready.get()) != (0, None):
            size, piece = got
            if size < 0:
                raise piece
            del got
            yield piece
            del piece
            with room:
                state["waiting"] -= size
                room.notify()
    finally:
        with room:
            state["stopped"] = True
            room.notify()
        thread.join()


@contextlib.contextmanager
def finished(path: Path, size: int, say: Say, replace: bool = False) -> Iterator[Path]:
    """A folder to write `size` bytes into, which gets the name `path` when all of it is on the disk."""
    partial = path.with_name(path.name + ".partial")
    if path.exists() and not replace:
        raise ConfigError(f"{path} exists already; delete it or name another output")
    if partial.exists():
        say(f"{partial} was left by a conversion that did not finish; starting over")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        free, needed = shutil.disk_usage(partial).free, size + SLACK_BYTES
        if free < needed:
            raise ConfigError(f"{path} needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        yield partial
        for file in [*partial.rglob("*"), partial]:
            files.sync(file)
    except BaseException:
        shutil.rmtree(partial)
        raise
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    files.sync(path.parent)


class Cast:
    """To one dtype, or none at all; counts the values that it changed."""

    def __init__(self, dtype: torch.dtype | None):
        self.dtype, self.changed, self.values = dtype, 0, 0

    def of(self, dtype: torch.dtype) -> torch.dtype:
        """What a tensor of `dtype` becomes."""
        return self.dtype or dtype

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.dtype in (None, tensor.dtype):
            return tensor
        result = tensor.to(self.dtype)
        self.values += tensor.numel()
        self.changed += int((result.to(tensor.dtype) != tensor).sum())
        return result

    def sentence(self) -> str:
        """What the cast did, empty when there was none."""
        if not self.values:
            return ""
        loss = f"lossy: {self.changed:,} changed" if self.changed else "none changed"
        return f"cast {self.values:,} values to {str(self.dtype).removeprefix('torch.')}, {loss}"
