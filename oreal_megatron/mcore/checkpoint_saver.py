"""Asynchronous saving of checkpoints: training waits only until the state is copied off the device.

Megatron plans the files; a thread of this process writes them instead of Megatron's forked processes, which would
outlive a killed rank and wait forever for a killed writer.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
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
from oreal_megatron.mcore import adam, checkpoint_state, megatron_patches
from oreal_megatron.mcore.megatron_patches import cpu_shim
from oreal_megatron.mcore.saved_model import SavedModel
from oreal_megatron.runtime import checkpoint_folders, disk_space, distributed, files, heartbeat

log = logging.getLogger(__name__)
ANNOUNCED_S = 10.0  # of waiting for the disk, until a message says so
SPARE_BYTES = 16 * 2**20  # of disk, for the files' indices beside the tensors
Describe = Callable[[str, Path], None]
Attachments = Callable[[], dict[str, bytes]]  # further files of a checkpoint, by name


@dataclass(frozen=True)
class PendingSave:
    """A checkpoint that a thread is writing."""

    partial: Path
    requests: list[AsyncRequest]
    written: Future[checkpoint_folders.Digests]  # of this rank's files


class CheckpointSaver:
    """Writer of one run's checkpoints."""

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, SavedModel],
        keep: int,
        keep_every: int = 0,
        describe: Describe = lambda name, path: None,
        attachments: Attachments = dict,
    ):
        """Take `keep` and `keep_every` as in checkpoint_folders.prune.

        `describe` is called on the first rank with each model's name and folder, to add a description for readers;
        `attachments` on all ranks, when a save begins; the first one writes its own.
        """
        self.folder, self.models, self.describe, self.attachments = folder, models, describe, attachments
        self.keep, self.keep_every = keep, keep_every
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: PendingSave | None = None

    def start(self, step: int, random_state: dict[str, Any] | None = None) -> None:
        """Copy the state after `step` steps and begin to write it, once the previous save has ended. Collective.

        `random_state` replaces the current one. Waits while the disk is full.
        """
        self.finish()
        if distributed.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        needed = sum(distributed.all_gather_object(sum(map(_bytes, self.models.values())))) + SPARE_BYTES
        disk_space.wait_for_room(self.folder, needed, "a checkpoint")
        partial = self.folder / (checkpoint_folders.name(step) + checkpoint_folders.PARTIAL)
        attachments = self.attachments()
        if distributed.rank() == 0:
            checkpoint_folders.begin(partial, self.models)
            for name, content in attachments.items():
                files.write_when_space(self.folder, (partial / name).write_bytes, content)
        common = {"step": step, "layout": checkpoint_state.layout()}
        common["random"] = distributed.all_gather_object(random_state or checkpoint_state.random_state())
        requests = [_plan_files(model, partial / name, common) for name, model in self.models.items()]
        self.pending = PendingSave(partial, requests, self.thread.submit(_write_all, partial, requests))

    def save(self, step: int, random_state: dict[str, Any] | None = None) -> Path:
        """Save the state after `step` steps, wait until it is written, and return the folder. Collective."""
        self.start(step, random_state)
        self.finish()
        return self.folder / checkpoint_folders.name(step)

    def poll(self) -> None:
        """Finish the pending save if all ranks have written their part. Collective."""
        if self.pending and all(distributed.all_gather_object(self.pending.written.done())):
            self.finish()

    def finish(self) -> None:
        """Wait until the pending save is complete and has its final name. Collective.

        Raises RunStopped, on all ranks, if a part could not be written.
        """
        if not self.pending:
            return
        announced = threading.Timer(ANNOUNCED_S, log.info, [f"waiting until {self.pending.partial.name} is written"])
        announced.start()
        try:
            self._wait(self.pending)
        finally:
            announced.cancel()
        pending, self.pending = self.pending, None
        digests = _gather_digests(pending)
        disk_space.wait_for_room(
            self.folder, SPARE_BYTES, "a checkpoint"
        )  # Megatron's index of the files cannot wait for a full disk
        with cpu_shim():
            for request in pending.requests:
                for finalize in request.finalize_fns:
                    finalize()
        if distributed.rank() == 0:
            files.write_when_space(self.folder, self._complete, pending.partial, digests)
        dist.barrier()

    def _wait(self, pending: PendingSave) -> None:
        """Wait until all ranks have written their files, in short collectives, none of which exceeds its time limit."""
        while not all(distributed.all_gather_object(pending.written.done())):
            if pending.written.done():  # ranks without progress are then those that cannot write
                heartbeat.beat()
            time.sleep(0.01)

    def _complete(self, partial: Path, digests: checkpoint_folders.Digests) -> None:
        if partial.exists():  # after a retry only the lines below are repeated
            for name in self.models:
                self.describe(name, partial / name)
            checkpoint_folders.finish(partial, digests)
        checkpoint_folders.prune(self.folder, self.keep, self.keep_every)


def _bytes(model: SavedModel) -> int:
    """Return the bytes of this rank's part: weights, and their main copy and two moments in float32, each once."""
    parameters = (parameter for chunk in model.saved_chunks for parameter in chunk.parameters())
    states = 12 if model.saved_optimizer else 0
    total = sum(parameter.numel() * (parameter.element_size() + states) for parameter in parameters)
    return total // parallel_state.get_data_parallel_world_size(with_context_parallel=True)


def _plan_files(model: SavedModel, folder: Path, common: dict[str, Any]) -> AsyncRequest:
    """Return this rank's files as Megatron divides them, with their tensors copied to the host. Collective."""
    megatron_patches.use_local_results_queue()
    state = common | model.small_state()
    read_only = model.reading_changes_nothing
    with cpu_shim(), model.parts.on_device(*model.saved_parts, read_only=read_only), model.readable():
        request = dist_checkpointing.save(
            state | checkpoint_state.sharded(model, loading=False), str(folder), async_sharded_save=True
        )
        if request.async_fn is not None:  # None: this rank has no part of it
            _, planned_files, _ = request.async_fn_args
            # In place, because Megatron's writer refers to the same list.
            planned_files[:] = _copied(request.preload_fn(), _changing_storages(model))
        return request


def _changing_storages(model: SavedModel) -> set[int]:
    """Return the storages whose content changes when training continues."""
    weights = [tensor for chunk in model.saved_chunks for tensor in (*chunk.parameters(), *chunk.buffers())]
    states = adam.state_tensors(model.saved_optimizer) if model.saved_optimizer else []
    return {tensor.untyped_storage()._cdata for tensor in [*weights, *states]}


def _copied(planned_files: list[Any], changing: set[int]) -> list[Any]:
    """Clone the tensors that are still in a changing storage; Megatron has copied the others (views, a GPU's)."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage()._cdata in changing else tensor

    return [
        (path, key, (blobs, [(item, copy(tensor)) for item, tensor in tensors]))
        for path, key, (blobs, tensors) in planned_files
    ]


def _write_all(partial: Path, requests: list[AsyncRequest]) -> checkpoint_folders.Digests:
    """Write this rank's files, waiting while the disk is full; return the digests of what the disk contains."""
    digests = {}
    for request in requests:
        if request.async_fn is None:
            continue
        transforms = request.async_fn.args[0]
        _, planned_files, results = request.async_fn_args
        written = {}
        for number, file in enumerate(planned_files):
            written[number] = files.write_when_space(partial, _write, transforms, number, file)
            path = Path(file[0])
            digests[str(path.relative_to(partial))] = checkpoint_folders.digest(path)
        results.put(written)
    return digests


def _write(transforms: list[Any], number: int, file: Any) -> list[Any]:
    """Write one file; Megatron's writer returns its error like a result."""
    results: queue.Queue[Any] = queue.Queue()
    running: queue.Queue[int] = queue.Queue()
    running.put(number)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, number, file, results, running, True)
    _, written = results.get()
    if isinstance(written, Exception):
        raise written
    return written


def _gather_digests(pending: PendingSave) -> checkpoint_folders.Digests:
    """Return all ranks' digests; raise RunStopped on all ranks if one of them failed."""
    error = pending.written.exception()
    shares = distributed.all_gather_object((pending.written.result() if error is None else {}, error and f"{error}"))
    for rank, (_, failure) in enumerate(shares):
        if failure:
            raise RunStopped(
                f"{pending.partial.name} could not be written on rank {rank}: {failure}. Earlier checkpoints are "
                "complete; fix the file system and resume"
            )
    return {name: entry for digests, _ in shares for name, entry in digests.items()}
