"""Checkpoints are written while training goes on: it waits only until the state is copied off the device.

Megatron plans the files; a thread of this process writes them instead of Megatron's forked processes, which would
outlive a killed rank and wait for ever for a killed writer.
"""

from __future__ import annotations

import logging
import queue
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch import Tensor

from oreal_megatron.config import RunStopped
from oreal_megatron.mcore import adam, checkpoint_state
from oreal_megatron.mcore.cpu_shim import device_layer
from oreal_megatron.mcore.scorer import Trainer
from oreal_megatron.runtime import checkpoint_folders, distributed, files, heartbeat

log = logging.getLogger(__name__)

SPARE_BYTES = 16 * 2**20  # of disk, beyond the tensors: indices of the files
Describe = Callable[[str, Path], None]


@dataclass(frozen=True)
class Pending:
    """A checkpoint that a thread is writing."""

    partial: Path
    requests: list[AsyncRequest]
    written: Future[checkpoint_folders.Digests]  # of this rank's files


class Saver:
    """The checkpoints of one run."""

    def __init__(
        self,
        folder: Path,
        trainers: dict[str, Trainer],
        keep: int,
        keep_every: int = 0,
        describe: Describe = lambda name, path: None,
    ):
        """`keep` and `keep_every` as in checkpoints.prune; `describe`, called on the first rank with each model's name
        and folder, adds what its readers want to know."""
        self.folder, self.trainers, self.describe = folder, trainers, describe
        self.keep, self.keep_every = keep, keep_every
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Pending | None = None

    def start(self, step: int, random_state: dict[str, Any] | None = None) -> None:
        """Copy the state after `step` steps and begin to write it, once the save before it has ended. Collective.

        `random_state` replaces that of this moment. While the disk is full it waits.
        """
        self.finish()
        if distributed.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._wait_for_room(sum(distributed.all_gather_object(sum(map(_bytes, self.trainers.values())))) + SPARE_BYTES)
        partial = self.folder / (checkpoint_folders.name(step) + checkpoint_folders.PARTIAL)
        if distributed.rank() == 0:
            checkpoint_folders.begin(partial, self.trainers)
        common = {"step": step, "layout": checkpoint_state.layout()}
        common["random"] = distributed.all_gather_object(random_state or checkpoint_state.random_state())
        requests = [_planned(trainer, partial / name, common) for name, trainer in self.trainers.items()]
        self.pending = Pending(partial, requests, self.thread.submit(_write_all, partial, requests))

    def save(self, step: int, random_state: dict[str, Any] | None = None) -> Path:
        """Start and finish; the checkpoint's folder. Collective."""
        self.start(step, random_state)
        self.finish()
        return self.folder / checkpoint_folders.name(step)

    def poll(self) -> None:
        """End the save under way if all ranks have written their part. Collective."""
        if self.pending and all(distributed.all_gather_object(self.pending.written.done())):
            self.finish()

    def finish(self) -> None:
        """Wait until the save under way is whole and bears its name. Collective.

        Raises RunStopped, on all ranks, when a part could not be written.
        """
        if not self.pending:
            return
        while not all(
            distributed.all_gather_object(self.pending.written.done())
        ):  # short collectives: none outlasts its time
            if self.pending.written.done():  # so that the ranks which are late are those that cannot write
                heartbeat.beat()
            time.sleep(0.01)
        pending, self.pending = self.pending, None
        digests = _everyones(pending)
        self._wait_for_room(SPARE_BYTES)  # Megatron's index of the files does not bear a full disk
        with device_layer():
            for request in pending.requests:
                for finalize in request.finalize_fns:
                    finalize()
        if distributed.rank() == 0:
            files.with_room(self.folder, self._complete, pending.partial, digests)
        dist.barrier()

    def _complete(self, partial: Path, digests: checkpoint_folders.Digests) -> None:
        if partial.exists():  # else only what follows is repeated
            for name in self.trainers:
                self.describe(name, partial / name)
            checkpoint_folders.finish(partial, digests)
        checkpoint_folders.prune(self.folder, self.keep, self.keep_every)

    def _wait_for_room(self, needed: int) -> None:
        """Until the first rank sees so many bytes. Every look is a collective, so that none times out."""
        told = False
        while (free := distributed.all_gather_object(shutil.disk_usage(self.folder).free)[0]) < needed:
            if distributed.rank() == 0 and not told:
                log.warning(
                    f"a checkpoint needs {needed / 2**20:.0f} MiB more, but {self.folder} has {free / 2**20:.0f}; "
                    "waiting until there is more, nothing is lost"
                )
            told = True
            heartbeat.beat()
            time.sleep(files.PAUSE_S)
        if distributed.rank() == 0 and told:
            log.warning(f"there is space in {self.folder} again; continuing")


def _bytes(trainer: Trainer) -> int:
    """This rank's part of a checkpoint: weights, and their main copy and two moments in float32, each kept once."""
    parameters = (parameter for chunk in trainer.chunks for parameter in chunk.parameters())
    held = sum(parameter.numel() * (parameter.element_size() + 12) for parameter in parameters)
    return held // parallel_state.get_data_parallel_world_size(with_context_parallel=True)


def _planned(trainer: Trainer, folder: Path, common: dict[str, Any]) -> AsyncRequest:
    """This rank's files as Megatron divides them, with their tensors copied to the host. Collective."""
    filesystem_async._results_queue = queue.Queue()  # else Megatron starts a process to hold one
    state = common | {"updates": trainer.updates, "past": trainer.guard_state.to_checkpoint()}
    with device_layer(), trainer.parts.here(*checkpoint_state.HELD), trainer.readable():
        request = dist_checkpointing.save(
            state | checkpoint_state.sharded(trainer, loading=False), str(folder), async_sharded_save=True
        )
        if request.async_fn is not None:  # else nothing of it is this rank's
            _, files, _ = request.async_fn_args
            files[:] = _copied(request.preload_fn(), _changing(trainer))  # in place: Megatron's writer holds them too
        return request


def _changing(trainer: Trainer) -> set[int]:
    """Storages whose content changes while training goes on."""
    models = [tensor for chunk in trainer.chunks for tensor in (*chunk.module.parameters(), *chunk.module.buffers())]
    return {tensor.untyped_storage()._cdata for tensor in [*models, *adam.tensors(trainer.optimizer)]}


def _copied(files: list[Any], changing: set[int]) -> list[Any]:
    """Tensors that are still in a changing storage are cloned; Megatron has copied the others, views and a GPU's."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage()._cdata in changing else tensor

    return [
        (path, key, (blobs, [(item, own(tensor)) for item, tensor in tensors])) for path, key, (blobs, tensors) in files
    ]


def _write_all(partial: Path, requests: list[AsyncRequest]) -> checkpoint_folders.Digests:
    """Write this rank's files and measure what the disk holds; a full disk is waited for."""
    digests = {}
    for request in requests:
        if request.async_fn is None:
            continue
        transforms = request.async_fn.args[0]
        _, entries, results = request.async_fn_args
        written = {}
        for number, file in enumerate(entries):
            written[number] = files.with_room(partial, _write, transforms, number, file)
            path = Path(file[0])
            digests[str(path.relative_to(partial))] = checkpoint_folders.digest(path)
        results.put(written)
    return digests


def _write(transforms: list[Any], number: int, file: Any) -> list[Any]:
    """One file; Megatron's writer hands its error over like a result."""
    results, running = queue.Queue(), queue.Queue()
    running.put(number)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, number, file, results, running, True)
    _, written = results.get()
    if isinstance(written, Exception):
        raise written
    return written


def _everyones(pending: Pending) -> checkpoint_folders.Digests:
    """All ranks' digests; a rank that failed alone would leave the others waiting."""
    error = pending.written.exception()
    shares = distributed.all_gather_object((pending.written.result() if error is None else {}, error and f"{error}"))
    for rank, (_, failure) in enumerate(shares):
        if failure:
            raise RunStopped(
                f"{pending.partial.name} could not be written on rank {rank}: {failure}. Checkpoints before it are "
                "whole; mend the file system and resume"
            )
    return {name: entry for digests, _ in shares for name, entry in digests.items()}
