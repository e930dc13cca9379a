"""Weight sync: send the policy's weights to the engine and verify that they arrived. The public face of this package.

`connect` returns the weight sync of a policy and an engine; `full_tensors` yields the policy's full tensors for
everyone else who needs them (export, tests).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from oreal_megatron.config import Config, RunStopped
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.models.tensors import Entry
from oreal_megatron.protocols import Metrics, WeightReceiver
from oreal_megatron.reshard import planner, vllm_layout
from oreal_megatron.reshard.byte_counter import ByteCounter
from oreal_megatron.reshard.checksum import ChecksumMismatch, EngineChecksum
from oreal_megatron.reshard.direct_transport import DirectTransfer
from oreal_megatron.reshard.gather_transport import GatherGroups, gather_tensors
from oreal_megatron.reshard.loader_checksum import LoaderChecksum
from oreal_megatron.reshard.overlaps import ReshardLayout
from oreal_megatron.runtime import distributed

NamedTensors = Iterator[tuple[str, Tensor]]


class WeightSource(Protocol):
    """A model on the ranks of a trainer, as far as resharding needs it."""

    arch: Architecture
    config: Config

    def named_shards(self) -> Iterable[tuple[Entry, Tensor]]:
        """Return this rank's parameters with their mapping entries."""
        ...

    def readable(self) -> AbstractContextManager[None]:
        """Keep the parameters on the device, with the latest update gathered. Collective."""
        ...

    def process_groups(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Return the tensor-parallel and the pipeline-parallel group of this rank."""
        ...


class WeightMismatch(RunStopped):
    """After a transfer the engine does not hold the trainer's weights."""


def connect(policy: WeightSource, engine: WeightReceiver) -> EngineWeightSync:
    """Return the weight sync between a policy and an engine. Collective."""
    return EngineWeightSync(
        reshard_layout(policy.arch, policy.config, distributed.world_size(), distributed.node_size()),
        policy.config.engine.transport,
        policy.config.engine.buffer_mib * 2**20,
        policy.named_shards,
        partial(full_tensors, policy),
        engine,
        policy.readable,
    )


def reshard_layout(arch: Architecture, config: Config, world: int, node: int) -> ReshardLayout:
    """Return the layout of trainer and engine; context-parallel ranks hold the same weights as data-parallel ones."""
    parallel = config.parallel
    return ReshardLayout(arch, parallel.tensor, parallel.pipeline, parallel.virtual, config.engine.tensor, world, node)


def full_tensors(model: WeightSource, counter: ByteCounter | None = None, head: str = "lm") -> NamedTensors:
    """Yield a model's weights as full Hugging Face tensors on every rank, and count the bytes that travel.

    `head` is "scalar" for a reward model. Collective: every rank must exhaust the iterator.
    """
    with model.readable():
        shards = list(model.named_shards())
        dtype, device = getattr(torch, model.config.model.dtype), shards[0][1].device
        groups = GatherGroups(*model.process_groups(), dtype, device, model.config.parallel.virtual, head)
        yield from gather_tensors(shards, model.arch, groups, counter or ByteCounter(distributed.node_size()))


class EngineWeightSync:
    """Weight sync with a requested transport, "direct" or "gather".

    `direct` writes overlaps into the engine's live parameters. If the engine has transformed them after loading, or if
    their layout differs from vllm_layout.py, full tensors go through the engine's own loader instead (`gather`), and
    `refusal` gives the reason. Checksums compare the engine's parameters with the trainer's weights after every
    transfer; where the parameters cannot be read, the tensors given to the loader.
    """

    def __init__(
        self,
        layout: ReshardLayout,
        transport: str,
        buffer_bytes: int,
        named_shards: Callable[[], Iterable[tuple[Entry, Tensor]]],
        full_tensors: Callable[[ByteCounter], NamedTensors],
        engine: WeightReceiver,
        readable: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self.layout, self.buffer_bytes, self.readable = layout, buffer_bytes, readable
        self.named_shards, self.full_tensors, self.engine = named_shards, full_tensors, engine
        parameters, refusal = engine.live()
        refusal = refusal or vllm_layout.mismatch(parameters, layout.arch, layout.engine)
        self.refusal = next(filter(None, distributed.all_gather_object(refusal)), "")  # the same decision on all ranks
        self.transport = transport if not self.refusal else "gather"
        self.plan: planner.TransferPlan | None = None
        self.direct: DirectTransfer | None = None
        self.engine_checksum: EngineChecksum | None = None
        self.loader_checksum: LoaderChecksum | None = None
        if self.refusal:
            first = next(iter(named_shards()))[1]
            self.loader_checksum = LoaderChecksum(layout, distributed.rank(), first.dtype, first.device)

    @property
    def description(self) -> str:
        """Transport, and what the checksums verify."""
        if self.refusal:
            return f"{self.transport} ({self.refusal}); the tensors given to the engine's loader are verified"
        return f"{self.transport}; every parameter of the engine is verified"

    def sync(self, version: int) -> Metrics:
        """Make the engine hold the weights of a policy version, unless it does; return metrics. Collective."""
        if self.engine.awake and self.engine.version == version:
            return {}
        self.engine.wake()
        metrics = self.send(version)
        self.engine.accept(version)
        return metrics

    def send(self, version: int) -> Metrics:
        """Transfer and verify the weights; return metrics. Collective.

        Raises WeightMismatch, on all ranks, naming the first tensor that differs.
        """
        counter = ByteCounter(self.layout.node)
        with self.readable():
            mismatches = self._transfer(counter)
        gathered = distributed.all_gather_object((counter, mismatches))
        self._check([mismatches for _, mismatches in gathered], version)
        return self._metrics([counter for counter, _ in gathered])

    def _transfer(self, counter: ByteCounter) -> list[ChecksumMismatch]:
        """Send the weights by the transport in use; return the tensors of this rank that arrived wrong."""
        if self.transport == "gather":
            full = self.full_tensors(counter)
            self.engine.load(self.loader_checksum.watch(full) if self.loader_checksum else full)
        trainer_tensors = {entry.megatron: tensor.detach() for entry, tensor in self.named_shards()}
        parameters, _ = self.engine.live()
        plan = self._plan(parameters)
        if self.loader_checksum:
            return self.loader_checksum.mismatches(trainer_tensors)
        if plan is None:
            raise RuntimeError("an engine with experts has no layout to verify")  # vllm_layout.mismatch refuses it
        direct, engine_checksum = self._views(plan, trainer_tensors, parameters)
        if self.transport == "direct":
            direct.run(counter)
        return engine_checksum.mismatches()

    def _plan(self, parameters: dict[str, Tensor]) -> planner.TransferPlan | None:
        """Plan once; None for mixtures of experts, which only the engine's loader can place."""
        if self.plan is None and not self.layout.arch.experts:
            itemsize = next(iter(parameters.values())).itemsize
            batch_bytes = self.buffer_bytes // planner.BUFFERS
            self.plan = planner.plan_transfer(self.layout, distributed.rank(), itemsize, batch_bytes)
        return self.plan

    def _views(
        self, plan: planner.TransferPlan, trainer_tensors: dict[str, Tensor], parameters: dict[str, Tensor]
    ) -> tuple[DirectTransfer, EngineChecksum]:
        """Return views of the tensors of both sides, made again only if a tensor has moved."""
        direct, checksum = self.direct, self.engine_checksum
        if direct is None or checksum is None or direct.is_stale(trainer_tensors, parameters):
            direct = DirectTransfer(plan, trainer_tensors, parameters)
            previous = checksum.previous if checksum else None
            checksum = EngineChecksum(self.layout, plan, distributed.rank(), trainer_tensors, parameters, previous)
            self.direct, self.engine_checksum = direct, checksum
        return direct, checksum

    def _check(self, mismatches: list[list[ChecksumMismatch]], version: int) -> None:
        """Raise WeightMismatch if any rank has a mismatch."""
        failing = [(rank, tensors) for rank, tensors in enumerate(mismatches) if tensors]
        if not failing:
            return
        rank, tensors = failing[0]
        side = "given to the loader of the engine" if self.loader_checksum else "of the engine"
        state = "it is unchanged since the previous weight sync" if tensors[0].unchanged else "it holds other values"
        raise WeightMismatch(
            f"policy version {version} was sent by the {self.transport} transport, but the checksum of "
            f"{tensors[0].name} {side} on rank {rank} differs from the trainer's: {state} ({len(tensors)} tensors "
            f"differ on this rank, {len(failing)} ranks are affected). No response was generated with them; resume "
            "from the last checkpoint"
        )

    def _metrics(self, counters: list[ByteCounter]) -> Metrics:
        metrics = {"weight_sync/direct": float(self.transport == "direct")}
        metrics["weight_sync/verified_parameters"] = float(
            len(self.engine_checksum.names) if self.engine_checksum else 0
        )
        metrics["weight_sync/verified_tensors"] = float(len(self.loader_checksum.index) if self.loader_checksum else 0)
        for name in ("sent", "received", "sent_between", "received_between"):  # of the busiest rank
            metrics[f"weight_sync/{name}_bytes"] = float(max(getattr(counter, name) for counter in counters))
        metrics["weight_sync/between_nodes_bytes"] = float(sum(counter.received_between for counter in counters))
        return metrics | (self.plan.traffic.lower_bounds() if self.plan else {})
