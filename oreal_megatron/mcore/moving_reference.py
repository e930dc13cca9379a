"""A reference that follows the policy: reference <- a reference + (1 - a) policy, every n updates (T1).

The average is kept in float32: in bfloat16 a step of 1 - a times an update would be rounded away. With a = 0 the
reference is a copy of the policy.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from oreal_megatron.config import Config
from oreal_megatron.mcore import gpt_model
from oreal_megatron.mcore.megatron_patches import cpu_shim
from oreal_megatron.mcore.offload import MemoryPart
from oreal_megatron.mcore.scorer import parameters
from oreal_megatron.mcore.trained_models import Policy, Reader, Reference
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.records import Batch


class MovingReference(Reference):
    """The reference policy, moved just before it scores. Implements saved_model.SavedModel.

    Its state is a function of the policy's updates: a resumed run, whose checkpoint has the average and the update of
    its last move, continues equal.
    """

    reading_changes_nothing = True
    saved_optimizer = None

    def __init__(self, arch: Architecture, config: Config, read: Reader, policy: Policy):
        super().__init__(arch, config, read)
        self.config, self.policy, self.updates = config, policy, 0  # updates of the policy at the last move
        self.average = _average(self.chunks, arch, config, read)
        self.saved_parts: tuple[str, ...] = ("parameters",)
        if self.average is not self.chunks:
            self.saved_parts = ("parameters", "average")
            self.parts["average"] = MemoryPart(lambda: parameters(self.average))
            if config.offload:
                self.parts["average"].offload()

    @property
    def saved_chunks(self) -> list[GPTModel]:
        """Chunks of the average."""
        return self.average

    def score(self, batch: Batch) -> list[Tensor] | None:
        """Return the log-probs of the reference, after a move if one is due. Collective."""
        if self.policy.updates - self.updates >= self.config.reference.every:
            self._move()
        return super().score(batch)

    @torch.no_grad()
    def _move(self) -> None:
        decay = self.config.reference.decay
        with self.policy.readable(), self.parts.on_device(*self.saved_parts), cpu_shim():
            policy = parameters(self.policy.chunks)
            for average, present in zip(parameters(self.average), policy, strict=True):
                average.mul_(decay).add_(present.to(average.dtype), alpha=1 - decay)
            self._round()
        self.updates = self.policy.updates

    def _round(self) -> None:
        """Copy the average to the parameters that score."""
        if self.average is not self.chunks:
            for own, average in zip(parameters(self.chunks), parameters(self.average), strict=True):
                own.copy_(average)

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """Keep the average on the device."""
        with self.parts.on_device(*self.saved_parts, read_only=True):
            yield

    def small_state(self) -> dict[str, Any]:
        """Return the update of the policy at which the reference moved last."""
        return {"updates": self.updates}

    def restore_small_state(self, state: dict[str, Any]) -> None:
        """Take the update of the last move, and the loaded average as parameters."""
        self.updates = state["updates"]
        with torch.no_grad():
            self._round()


def build_reference(arch: Architecture, config: Config, read: Reader, policy: Policy) -> Reference:
    """Return the fixed or the moving reference, as the configuration says."""
    return MovingReference(arch, config, read, policy) if config.reference.moves else Reference(arch, config, read)


def _average(chunks: list[GPTModel], arch: Architecture, config: Config, read: Reader) -> list[GPTModel]:
    """Return chunks for the average: those of the reference where they are as precise as it."""
    if not config.wide_reference:
        return chunks
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    average = gpt_model.build(arch, wide, "lm")
    gpt_model.load(average, arch, wide, "lm", read)
    return [chunk.requires_grad_(False) for chunk in average]
