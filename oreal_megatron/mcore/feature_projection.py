"""Learned projection of a student's hidden states to the width of its teacher, trained with the student.

Its weights are in a module of the student's stage (trained_models.Policy), so they share its gradient buffers, its
optimizer and its checkpoints. gpt_model.named_shards omits them, so neither the engine nor a saved policy gets them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oreal_megatron.config import Config
from oreal_megatron.mcore import gpt_model, layers


class LayerProjection(nn.Module):
    """Linear map without bias, which no correlation depends on; every tensor-parallel rank holds all of it.

    The rows it reads are equal on all tensor-parallel ranks, hence so is its gradient: nothing to reduce. With sequence
    parallelism each rank reads its own rows, and gradients are marked to be summed.
    """

    def __init__(self, weight: Tensor, sequence_parallel: bool):
        super().__init__()
        self.weight = nn.Parameter(weight)  # [H of the teacher, H]
        layers.mark_sequence_parallel(self.weight, sequence_parallel)

    def forward(self, features: Tensor) -> Tensor:
        """Return [n, H of the teacher] of features [n, H]."""
        return F.linear(features, self.weight)


def build(number: int, hidden: int, teacher_hidden: int, config: Config) -> nn.ModuleList:
    """Return `number` projections, drawn on every rank from the seed so that they preserve a row's mean square."""
    generator, dtype = torch.Generator().manual_seed(config.seed), gpt_model.DTYPES[config.model.dtype]
    drawn = (torch.randn(teacher_hidden, hidden, generator=generator) / hidden**0.5 for _ in range(number))
    sequence_parallel = config.parallel.sequence
    return nn.ModuleList(LayerProjection(value.to(gpt_model.device(), dtype), sequence_parallel) for value in drawn)
