"""The policy's weights -> the engine, by the best transport that the engine allows, and the proof that they arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from oreal_megatron.config import RunStopped
from oreal_megatron.models.tensors import Entry
from oreal_megatron.reshard import planner, vllm_layout
from oreal_megatron.reshard.byte_counter import ByteCounter
from oreal_megatron.reshard.checksum import Checksums, Difference
from oreal_megatron.reshard.direct_transport import BUFFERS, Direct
from oreal_megatron.reshard.loader_checksum import LoaderChecksum
from oreal_megatron.reshard.overlaps import ReshardLayout
from oreal_megatron.runtime import distributed

Placed = Callable[[], Iterable[tuple[Entry, Tensor]]]  # this rank's tensors of the trainer
Full = Callable[[ByteCounter], Iterator[tuple[str, Tensor]]]  # full Hugging Face tensors on every rank


class WeightMismatch(RunStopped):
    """After a transfer the engine does not hold the trainer's weights."""


class WeightSync:
    """Carries weights with the wanted transport ("direct" or "gather").

    `direct` writes slices into the engine's live parameters. Where the engine has transformed them after loading, or
    lays them out in a way that vllm_layout.py does not know, `refusal` says why and full tensors go through the
    engine's own loader (`gather`). Either way the engine's parameters are compared with the trainer's; where that
    cannot be, the tensors that its loader is given.
    """

    def __init__(
        self,
        layout: ReshardLayout,
        wanted: str,
        buffer_bytes: int,
        placed: Placed,
        full: Full,
        engine: Any,
        here: Callable[[], AbstractContextManager] = nullcontext,  # has the trainer's weights on the device, and whole
    ):
        self.layout, self.buffer_bytes, self.here = layout, buffer_bytes, here
        self.named_shards, self.full, self.engine = placed, full, engine
        parameters, refusal = engine.live()
        refusal = refusal or vllm_layout.mismatch(parameters, layout.arch, layout.engine)
        self.refusal = next(filter(None, distributed.all_gather_object(refusal)), "")  # all ranks decide alike
        self.transport = wanted if not self.refusal else "gather"
        self.plan: planner.TransferPlan | None = None
        self.direct: Direct | None = None
        self.checksums: Checksums | None = None
        self.handed: LoaderChecksum | None = None
        if self.refusal:
            held = next(iter(placed()))[1]
            self.handed = LoaderChecksum(layout, distributed.rank(), held.dtype, held.device)

    @property
    def description(self) -> str:
        """Transport and proof, in words."""
        if self.refusal:
            return f"{self.transport}: {self.refusal}. Proved are the tensors that its loader is given"
        return f"{self.transport}. Proved is every parameter of the engine"

    def sync(self, version: int) -> dict[str, float]:
        """Let the engine hold the weights of a policy version, if it does not; metrics of the transfer. Collective."""
        if self.engine.awake and self.engine.version == version:
            return {}
        self.engine.wake()
        metrics = self.send(version)
        self.engine.accept(version)
        return metrics

    def send(self, version: int) -> dict[str, float]:
        """Transfer the weights and prove it; metrics. Collective.

        Raises WeightsDiffer, on all ranks, naming the first tensor that arrived wrong.
        """
        counted = ByteCounter(self.layout.node)
        with self.here():
            if self.transport == "gather":
                full = self.full(counted)
                self.engine.load(self.handed.passing(full) if self.handed else full)
            held = self._prepare()
            if self.transport == "direct":
                self.direct.run(counted)
            wrong = self.handed.differing(held) if self.handed else self.checksums.differing()
        everyones = distributed.all_gather_object((counted, wrong))
        self._refuse([wrong for _, wrong in everyones], version)
        return self._metrics([counted for counted, _ in everyones])

    def _prepare(self) -> dict[str, Tensor]:
        """Plan once; make views of the tensors anew only when one has moved. The trainer's tensors of this rank."""
        held = {entry.megatron: tensor.detach() for entry, tensor in self.named_shards()}
        live, _ = self.engine.live()
        if self.plan is None and not self.layout.arch.experts:
            itemsize = next(iter(live.values())).itemsize
            self.plan = planner.make(self.layout, distributed.rank(), itemsize, self.buffer_bytes // BUFFERS)
        if not self.refusal and (self.direct is None or self.direct.moved(held, live)):
            self.direct = Direct(self.plan, held, live)
            self.checksums = Checksums(self.layout, self.plan, distributed.rank(), held, live)
        return held

    def _refuse(self, wrong: list[list[Difference]], version: int) -> None:
        bad = [(rank, found) for rank, found in enumerate(wrong) if found]
        if bad:
            (rank, found), what = bad[0], "given to the loader of the engine" if self.handed else "of the engine"
            kind = "it is what it was after the hand-over before" if found[0].unchanged else "it holds something else"
            raise WeightMismatch(
                f"policy version {version} was handed over by the {self.transport} transport, but {found[0].name} "
                f"{what} on rank {rank} is not what the trainer holds, by its checksum: {kind} ({len(found)} tensors "
                f"there, {len(bad)} ranks with any). Nothing was generated with these weights; resume from the last "
                "checkpoint"
            )

    def _metrics(self, counted: list[ByteCounter]) -> dict[str, float]:
        metrics = {"weight_sync/direct": float(self.transport == "direct")}
        metrics["weight_sync/verified_parameters"] = float(len(self.checksums.names) if self.checksums else 0)
        metrics["weight_sync/verified_tensors"] = float(len(self.handed.place) if self.handed else 0)
        for name in ("sent", "received", "sent_between", "received_between"):  # of the busiest rank
            metrics[f"weight_sync/{name}_bytes"] = float(max(getattr(one, name) for one in counted))
        metrics["weight_sync/between_nodes_bytes"] = float(sum(one.received_between for one in counted))
        return metrics | (self.plan.traffic.least() if self.plan else {})
