"""A job whose ranks are threads of this process: the collectives of runtime/distributed.py without processes."""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from oreal_megatron.runtime import distributed

WAIT_S = 60.0


class ThreadWorld:
    """So many ranks; `run` calls a function on each and returns what each returned."""

    def __init__(self, size: int):
        self.size, self.barrier, self.values = size, threading.Barrier(size), [None] * size
        self.own = threading.local()
        self.exchanged = [0] * size  # values that each rank received in all_to_all_single

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size
        errors: list[BaseException | None] = [None] * self.size

        def work(rank: int) -> None:
            self.own.rank = rank
            try:
                results[rank] = function(rank)
            except threading.BrokenBarrierError:
                pass  # another rank failed
            except BaseException as error:
                errors[rank] = error
                self.barrier.abort()

        with self._patched():
            threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for error in filter(None, errors):
            raise error
        return results

    def all_gather_object(self, value: Any) -> list[Any]:
        self.values[self.own.rank] = pickle.dumps(value)
        self.barrier.wait(WAIT_S)
        gathered = [pickle.loads(packed) for packed in self.values]
        self.barrier.wait(WAIT_S)
        return gathered

    def gather_object(self, value: Any) -> list[Any]:
        gathered = self.all_gather_object(value)
        return gathered if self.own.rank == 0 else []

    def all_to_all_single(
        self, output: torch.Tensor, tensor: torch.Tensor, counts: list[int], sizes: list[int]
    ) -> None:
        assert len(output) == sum(counts) and len(tensor) == sum(sizes)
        parts = [sent[self.own.rank] for sent in self.all_gather_object(tensor.split(sizes))]
        assert [len(part) for part in parts] == counts, "torch would hang or fail"
        self.exchanged[self.own.rank] += len(output)
        output.copy_(torch.cat(parts))

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        with (
            mock.patch.object(distributed, "rank", lambda: self.own.rank),
            mock.patch.object(distributed, "world_size", lambda: self.size),
            mock.patch.object(distributed, "all_gather_object", self.all_gather_object),
            mock.patch.object(distributed, "gather_object", self.gather_object),
            mock.patch.object(torch.distributed, "all_to_all_single", self.all_to_all_single),
        ):
            yield
