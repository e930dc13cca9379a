"""Idle models leave the device: their storages are emptied in place and filled again, so that every view stays valid,
parameters' of Megatron's flat buffers and the optimizer's of both.

On a GPU, copies go to pinned memory on a stream of their own, and the host waits for none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


class Part:
    """Some of a model's memory, such as its parameters: on the device, or away."""

    def __init__(self, find: Callable[[], Iterable[Tensor]], kept: bool = True):
        """`find` gives the tensors, several of which may share a storage; not `kept`: what they hold may be lost."""
        self.find, self.kept = find, kept
        self._away: list[tuple[torch.UntypedStorage, int, Tensor | None]] | None = None

    @property
    def is_away(self) -> bool:
        return self._away is not None

    def bytes(self) -> int:
        """On the device now."""
        return sum(storage.nbytes() for storage in _storages(self.find()))

    def leave(self) -> None:
        self._away = [
            (storage, storage.nbytes(), _to_host(storage) if self.kept else None) for storage in _storages(self.find())
        ]
        for storage, _, _ in self._away:
            storage.resize_(0)

    def come_back(self) -> None:
        for storage, size, copy in self._away or []:
            storage.resize_(size)
            if copy is not None:
                _from_host(copy, storage)
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


def _to_host(storage: torch.UntypedStorage) -> Tensor:
    held = _bytes_of(storage)
    copy = torch.empty(len(held), dtype=torch.uint8, pin_memory=held.is_cuda)
    with _stream(held):
        copy.copy_(held, non_blocking=True)
    return copy


def _from_host(copy: Tensor, storage: torch.UntypedStorage) -> None:
    held = _bytes_of(storage)
    with _stream(held):
        held.copy_(copy, non_blocking=True)
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
