"""Interface of a model that checkpoints contain."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer

from oreal_megatron.config import Config
from oreal_megatron.mcore.offload import MemoryParts


class SavedModel(Protocol):
    """Shards of a model, and small values beside them."""

    config: Config
    parts: MemoryParts
    saved_parts: tuple[str, ...]  # parts of its memory that a checkpoint contains
    reading_changes_nothing: bool

    @property
    def saved_chunks(self) -> list[GPTModel]:
        """Chunks of this rank's stage, without wrappers."""
        ...

    @property
    def saved_optimizer(self) -> MegatronOptimizer | None:
        """The optimizer, if the model has one."""
        ...

    def readable(self) -> AbstractContextManager[None]:
        """Keep complete parameters on the device. Collective."""
        ...

    def small_state(self) -> dict[str, Any]:
        """Return the values besides the tensors, equal on all ranks."""
        ...

    def restore_small_state(self, state: dict[str, Any]) -> None:
        """Take the values of a checkpoint, whose tensors are loaded."""
        ...
