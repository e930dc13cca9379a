"""The policy's weights -> the engine, by the best transport that the engine allows, and the proof that they arrived."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from oreal_megatron import ranks
from oreal_megatron.config import RunStopped
from oreal_megatron.mapping.tensors import Entry
from oreal_megatron.reshard import gather, plan, vllm_layout
from oreal_megatron.reshard.checksum import Checksums
from oreal_megatron.reshard.direct import BUFFERS, Counted, Direct
from oreal_megatron.reshard.slices import Layout

Placed = Callable[[], Iterable[tuple[Entry, Tensor]]]  # this rank's tensors of the trainer
Full = Callable[[], Iterator[tuple[str, Tensor]]]  # full Hugging Face tensors on every rank


class WeightsDiffer(RunStopped):
    """After a transfer the engine does not hold the trainer's weights."""


class HandOver:
    """Carries weights with the wanted transport ("direct" or "gather").

    `direct` writes slices into the engine's live parameters. Where the engine has transformed them after loading, or
    lays them out in a way that vllm_layout.py does not know, `refusal` says why and full tensors go through the
    engine's own loader (`gather`). Either way the engine's parameters are compared with the trainer's, where they can.
    """

    def __init__(
        self,
        layout: Layout,
        wanted: str,
        buffer_bytes: int,
        placed: Placed,
        full: Full,
        engine: Any,
        here: Callable[[], AbstractContextManager] = nullcontext,  # has the trainer's weights on the device, and whole
    ):
        self.layout, self.buffer_bytes, self.here = layout, buffer_bytes, here
        self.placed, self.full, self.engine = placed, full, engine
        parameters, refusal = engine.live()
        refusal = refusal or vllm_layout.mismatch(parameters, layout.arch, layout.engine)
        self.refusal = next(filter(None, ranks.gather(refusal)), "")  # all ranks decide alike
        self.transport = wanted if not self.refusal else "gather"
        self.description = self.transport + (f": {self.refusal}" if self.refusal else "")
        self.plan: plan.Plan | None = None
        self.direct: Direct | None = None
        self.checksums: Checksums | None = None

    def __call__(self, version: int) -> dict[str, float]:
        """Let the engine hold the weights of a policy version, if it does not; metrics of the transfer. Collective."""
        if self.engine.awake and self.engine.version == version:
            return {}
        self.engine.wake()
        metrics = self.send(version)
        self.engine.accept(version)
        return metrics

    def send(self, version: int) -> dict[str, float]:
        """Transfer the weights and prove it; metrics. Collective.

        Raises WeightsDiffer, on all ranks, naming the first parameter that arrived wrong.
        """
        counted = Counted()
        with self.here():
            if self.transport == "gather":
                self.engine.load(self.full())
                counted.received = self._gathered_bytes()
            if not self.refusal:
                self._prepare()
            if self.transport == "direct":
                counted = self.direct.run()
            wrong = self.checksums.differing() if self.checksums else []
        everyones = ranks.gather((counted, wrong))
        self._refuse([wrong for _, wrong in everyones], version)
        return self._metrics([counted for counted, _ in everyones])

    def _prepare(self) -> None:
        """Plan once; make views of the tensors anew only when one has moved."""
        held = {entry.megatron: tensor.detach() for entry, tensor in self.placed()}
        live, _ = self.engine.live()
        if self.plan is None:
            itemsize = next(iter(live.values())).itemsize
            self.plan = plan.make(self.layout, ranks.rank(), itemsize, self.buffer_bytes // BUFFERS)
        if self.direct is None or self.direct.moved(held, live):
            self.direct = Direct(self.plan, held, live, self.layout.node)
            self.checksums = Checksums(self.layout, self.plan, ranks.rank(), held, live)

    def _gathered_bytes(self) -> int:
        layout, held = self.layout, next(iter(self.placed()))[1]
        stage, _ = layout.place(ranks.rank())
        return gather.received_bytes(
            layout.arch, layout.tensor, layout.pipeline, layout.chunks, stage, held.element_size()
        )

    def _refuse(self, wrong: list[list[str]], version: int) -> None:
        bad = [(rank, names) for rank, names in enumerate(wrong) if names]
        if bad:
            rank, names = bad[0]
            raise WeightsDiffer(
                f"policy version {version} was handed over by the {self.transport} transport, but {names[0]} of the "
                f"engine on rank {rank} is not what the trainer holds, by its checksum ({len(names)} parameters there, "
                f"{len(bad)} ranks with any). Nothing was generated with these weights; resume from the last checkpoint"
            )

    def _metrics(self, counted: list[Counted]) -> dict[str, float]:
        metrics = {"reshard/direct": float(self.transport == "direct")}
        metrics["reshard/proved_parameters"] = float(len(self.checksums.names) if self.checksums else 0)
        if self.transport == "gather":
            return metrics | {"reshard/received_bytes": float(max(one.received for one in counted))}
        for field in dataclasses.fields(Counted):  # of the busiest rank
            metrics[f"reshard/{field.name}_bytes"] = float(max(getattr(one, field.name) for one in counted))
        metrics["reshard/between_nodes_bytes"] = float(sum(one.received_between for one in counted))
        return metrics | self.plan.traffic.least()
