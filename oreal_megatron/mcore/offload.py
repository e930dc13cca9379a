"""Idle models leave the device: their storages are emptied in place and filled again, so that every view stays valid,
parameters' of Megatron's flat buffers and the optimizer's of both.

On a GPU, copies go to pinned memory on a stream of their own, and the host waits for none of them. torch rounds every
piece of pinned memory up to a power of two, so a copy is cut into such pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

SMALLEST = 2**16  # bytes of a piece of pinned memory that must be a power of two


class Part:
    """Some of a model's memory, such as its parameters: on the device, or away."""

    def __init__(self, find: Callable[[], Iterable[Tensor]], kept: bool = True):
        """`find` gives the tensors, several of which may share a storage; not `kept`: what they hold may be lost."""
        self.find, self.kept = find, kept
        self._away: list[tuple[torch.UntypedStorage, int, list[Tensor]]] | None = None

    @property
    def is_away(self) -> bool:
        return self._away is not None

    def bytes(self) -> int:
        """On the device now."""
        return sum(storage.nbytes() for storage in _storages(self.find()))

    def leave(self) -> None:
        self._away = [
            (storage, storage.nbytes(), _to_host(storage) if self.kept else []) for storage in _storages(self.find())
        ]
        for storage, _, _ in self._away:
            storage.resize_(0)

    def come_back(self) -> None:
        for storage, size, copies in self._away or []:
            storage.resize_(size)
            if copies:
                _from_host(copies, storage)
        self._away = None


class Parts(dict[str, Part]):
    """The parts of one model, by name."""

    @contextlib.contextmanager
    def here(self, *names: str) -> Iterator[None]:
        """Have these parts on the device; those that were away leave again."""
        fetched = [self[name] for name in names if self[name].is_away]
        for part in fetched:
            part.come_back()
        try:
            yield
        finally:
            for part in fetched:
                part.leave()

    def leave(self) -> None:
        """From now on, parts are on the device only where `here` asks for them."""
        for part in self.values():
            part.leave()


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    return list({storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}.values())


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _sizes(size: int) -> list[int]:
    """Powers of two that add up to `size`, largest first; the rest, below SMALLEST, is whatever is left."""
    sizes = []
    while size >= SMALLEST:
        sizes.append(1 << (size.bit_length() - 1))
        size -= sizes[-1]
    return [*sizes, size] if size else sizes


def _to_host(storage: torch.UntypedStorage) -> list[Tensor]:
    held = _bytes_of(storage)
    sizes = _sizes(len(held))
    copies = [torch.empty(size, dtype=torch.uint8, pin_memory=held.is_cuda) for size in sizes]
    with _stream(held):
        for copy, piece in zip(copies, held.split(sizes), strict=True):
            copy.copy_(piece, non_blocking=True)
    return copies


def _from_host(copies: list[Tensor], storage: torch.UntypedStorage) -> None:
    held = _bytes_of(storage)
    with _stream(held):
        for copy, piece in zip(copies, held.split([len(copy) for copy in copies]), strict=True):
            piece.copy_(copy, non_blocking=True)
    if held.is_cuda:
        torch.cuda.current_stream().wait_stream(_streams[held.device])


_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextlib.contextmanager
def _stream(held: Tensor) -> Iterator[None]:
    """The copying stream, after what was asked of the device so far; the allocator waits for it with this memory."""
    if not held.is_cuda:
        yield
        return
    stream = _streams.setdefault(held.device, torch.cuda.Stream(held.device))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    held.record_stream(stream)
