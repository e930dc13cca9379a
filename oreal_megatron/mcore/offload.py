"""Offloading of idle models: their storages are emptied in place and filled again, so that every view stays valid.

Views are the parameters in Megatron's flat buffers, and the optimizer's of both. On a GPU, copies go to pinned memory
on a stream of their own, and the host waits for none of them. torch rounds every block of pinned memory up to a power
of two, so a copy is split into such blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

SMALLEST_BLOCK = 2**16  # bytes of a block of pinned memory that must be a power of two


class MemoryPart:
    """A part of a model's memory, such as its parameters: on the device, or offloaded."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], preserve: bool = True):
        """Take a function that returns the tensors, several of which may share a storage.

        Without `preserve`, their values may be lost while they are offloaded.
        """
        self.tensors, self.preserve = tensors, preserve
        self._offloaded: list[tuple[torch.UntypedStorage, int, list[Tensor]]] | None = None
        self._host_copies: dict[int, list[Tensor]] = {}  # by storage: of content that was only read since

    @property
    def is_offloaded(self) -> bool:
        """True while the tensors are not on the device."""
        return self._offloaded is not None

    def bytes(self) -> int:
        """Return the bytes on the device now."""
        return sum(storage.nbytes() for storage in _storages(self.tensors()))

    def offload(self) -> None:
        """Copy the tensors to the host, if they are preserved, and free their memory on the device."""
        self._offloaded = [
            (storage, storage.nbytes(), self._copies_of(storage) if self.preserve else [])
            for storage in _storages(self.tensors())
        ]
        self._host_copies = {}
        for storage, _, _ in self._offloaded:
            storage.resize_(0)

    def restore(self, read_only: bool = False) -> None:
        """Bring the tensors back to the device; what is only read needs no copy when it leaves again."""
        for storage, size, copies in self._offloaded or []:
            storage.resize_(size)
            if copies:
                _from_host(copies, storage)
                if read_only:
                    self._host_copies[storage._cdata] = copies
        self._offloaded = None

    def _copies_of(self, storage: torch.UntypedStorage) -> list[Tensor]:
        copies = self._host_copies.get(storage._cdata)
        return _to_host(storage) if copies is None else copies


class MemoryParts(dict[str, MemoryPart]):
    """The parts of one model's memory, by name."""

    @contextlib.contextmanager
    def on_device(self, *names: str, read_only: bool = False) -> Iterator[None]:
        """Keep these parts on the device; those that were offloaded before are offloaded again afterwards.

        `read_only`: nothing in the context changes them, so that their host copies stay valid.
        """
        restored = [self[name] for name in names if self[name].is_offloaded]
        for part in restored:
            part.restore(read_only)
        try:
            yield
        finally:
            for part in restored:
                part.offload()

    def offload(self) -> None:
        """Offload all parts; from now on they are on the device only within `on_device`."""
        for part in self.values():
            part.offload()


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    return list({storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}.values())


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _block_sizes(size: int) -> list[int]:
    """Return powers of two that add up to `size`, largest first; a remainder below SMALLEST_BLOCK comes last."""
    sizes = []
    while size >= SMALLEST_BLOCK:
        sizes.append(1 << (size.bit_length() - 1))
        size -= sizes[-1]
    return [*sizes, size] if size else sizes


def _to_host(storage: torch.UntypedStorage) -> list[Tensor]:
    content = _as_bytes(storage)
    sizes = _block_sizes(len(content))
    copies = [torch.empty(size, dtype=torch.uint8, pin_memory=content.is_cuda) for size in sizes]
    with _copy_stream(content):
        for copy, block in zip(copies, content.split(sizes), strict=True):
            copy.copy_(block, non_blocking=True)
    return copies


def _from_host(copies: list[Tensor], storage: torch.UntypedStorage) -> None:
    content = _as_bytes(storage)
    with _copy_stream(content):
        for copy, block in zip(copies, content.split([len(copy) for copy in copies]), strict=True):
            block.copy_(copy, non_blocking=True)
    if content.is_cuda:
        torch.cuda.current_stream().wait_stream(_streams[content.device])


_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextlib.contextmanager
def _copy_stream(content: Tensor) -> Iterator[None]:
    """Switch to the copying stream after the work queued so far; the allocator waits for it with this memory."""
    if not content.is_cuda:
        yield
        return
    stream = _streams.setdefault(content.device, torch.cuda.Stream(content.device))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    content.record_stream(stream)
