"""Distillation: a policy that imitates a frozen teacher on demonstrations (algo/feature_imitation.py).

A correlation is over all tokens of a step, which no micro-batch sees: one more forward pass of the student sums the
moments, and the update then adds the gradient, known in closed form, where the features are. Results therefore do not
depend on packing and layout. Both models have the layout of the recipe, without pipeline stages. With
`distillation.projection` the features are those of the student's layer after a learned map (feature_projection.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from oreal_megatron.algo import feature_imitation as imitation
from oreal_megatron.algo import loss
from oreal_megatron.config import Config
from oreal_megatron.mcore import feature_projection, layer_hooks, logit_imitation
from oreal_megatron.mcore.gpt_model import device
from oreal_megatron.mcore.trained_models import Policy, Reader, Reference
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.protocols import Metrics
from oreal_megatron.records import Batch, MicroBatch


class Term(Protocol):
    """The teacher's term of one step. Its metrics, loss/distillation among them, add up over micro-batches."""

    def __call__(self, number: int, micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the term of a micro-batch, from the student's last hidden states, and metrics."""
        ...


class Student(Policy):
    """The policy in distillation: `imitate` adds the teacher's term to the cross entropy."""

    def __init__(
        self, arch: Architecture, config: Config, read: Reader, teacher: Reference, teacher_arch: Architecture
    ):
        self.teacher, self.width = teacher, teacher_arch.hidden
        self.pairs = imitation.match_layers(arch.layers, teacher_arch.layers, config.distillation.layers)
        learned, count = config.distillation.projection, len(self.pairs)
        self.projections = feature_projection.build(count, arch.hidden, self.width, config) if learned else None
        super().__init__(arch, config, read, self.projections)

    def imitate(self, batch: Batch) -> tuple[list[Tensor], Metrics]:
        """Take one step on demonstrations; returns as `Policy.imitate`."""
        config = self.config.distillation

        def objective(
            number: int, micro_batch: MicroBatch, hidden: Tensor, logp_T: Tensor
        ) -> tuple[Tensor, dict[str, Tensor]]:
            cross_entropy, _ = loss.supervised(logp_T, batch.counts)
            imitated, metrics = term(number, micro_batch, hidden)
            parts = {"loss/cross_entropy": cross_entropy.detach(), **metrics}
            weights = {"loss/cross_entropy": config.cross_entropy_coef, "loss/distillation": config.coef}
            parts["loss/total"] = sum((weight * parts[name] for name, weight in weights.items()), torch.zeros(()))
            return config.cross_entropy_coef * cross_entropy + config.coef * imitated, parts

        with self._term(batch) as term:
            return self.train_supervised(batch, objective)

    def _term(self, batch: Batch) -> contextlib.AbstractContextManager[Term]:
        if self.config.distillation.on_logits:
            return logit_imitation.logit_term(self, self.teacher, batch, self.config.distillation)
        return self._hidden_term(batch)

    @contextlib.contextmanager
    def _hidden_term(self, batch: Batch) -> Iterator[Term]:
        """Compare hidden states: their gradients are added to the outputs of the layers."""
        sequence_parallel, tokens = self.config.parallel.sequence, batch.counts.action_tokens
        distance = imitation.DISTANCES[self.config.distillation.objective]
        rows = [layer_hooks.action_rows(part.to(device()), sequence_parallel) for part in batch.micro_batches]
        features = _read_features(self.teacher, batch, [teacher for _, teacher in self.pairs], rows)
        own_layers = [own for own, _ in self.pairs]
        channels = self._statistics(batch, own_layers, rows, features)
        scale = self.config.distillation.coef / (len(own_layers) * self.width)

        def visit(number: int, index: int, hidden: Tensor) -> Tensor:
            own = self._features(index, hidden, rows[number])
            gradient = distance.gradient(own.detach(), features[number][index], channels[index], tokens)
            return layer_hooks.add_gradient(hidden, own, scale * gradient)

        metrics = _hidden_metrics(channels, distance)
        with layer_hooks.visited_layers(self.chunks[0], own_layers, visit):
            yield partial(_reported_once, metrics)

    def _statistics(
        self, batch: Batch, layers: Sequence[int], rows: Sequence[Tensor], features: Sequence[Sequence[Tensor]]
    ) -> list[imitation.Statistics]:
        """Return the statistics of each layer's channels over the step, from a forward pass. Collective."""
        sums = torch.zeros(len(layers), 5, self.width, dtype=torch.float64, device=device())

        def visit(number: int, index: int, hidden: Tensor) -> Tensor:
            own = self._features(index, hidden, rows[number])
            sums[index] += imitation.moments(own, features[number][index])
            return hidden

        with layer_hooks.visited_layers(self.chunks[0], layers, visit):
            self.read_outputs(batch, _nothing)
        sum_over_tokens(sums, self.config.parallel.sequence)
        return [imitation.statistics(moments, batch.counts.action_tokens) for moments in sums]

    def _features(self, index: int, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return rows [n, C] of a layer's output, in the width of the teacher."""
        own = layer_hooks.select_rows(hidden, rows)
        return self.projections[index](own) if self.projections is not None else own


def sum_over_tokens(sums: Tensor, sequence_parallel: bool) -> None:
    """Add the sums of all ranks that have other tokens, in place. Collective."""
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if sequence_parallel:
        dist.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())


def _read_features(
    teacher: Reference, batch: Batch, layers: Sequence[int], rows: Sequence[Tensor]
) -> list[list[Tensor]]:
    """Return the teacher's hidden states [n, H] at the action tokens of this rank, by micro-batch and layer."""
    features: list[list[Tensor]] = [[] for _ in batch.micro_batches]

    def visit(number: int, index: int, hidden: Tensor) -> Tensor:
        features[number].append(layer_hooks.select_rows(hidden, rows[number]))
        return hidden

    with layer_hooks.visited_layers(teacher.chunks[0], layers, visit):
        teacher.read_outputs(batch, _nothing)
    return features


def _nothing(hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
    return hidden.new_zeros(())


def _hidden_metrics(channels: Sequence[imitation.Statistics], distance: imitation.Distance) -> dict[str, Tensor]:
    """Return the loss, the mean correlation and the number of constant channels of a step."""
    count = sum(len(layer.correlation) for layer in channels)
    return {
        "loss/distillation": torch.stack([distance.loss(layer) for layer in channels]).sum() / count,
        "distillation/correlation": torch.stack([layer.correlation.sum() for layer in channels]).sum() / count,
        "distillation/constant_channels": torch.stack([(~layer.varies).sum() for layer in channels]).sum().double(),
    }


def _reported_once(
    metrics: dict[str, Tensor], number: int, micro_batch: MicroBatch, hidden: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Report metrics of the entire step with the first micro-batch of every replica, an equal share each."""
    share = 1 / parallel_state.get_data_parallel_world_size() if number == 0 else 0.0
    return hidden.new_zeros(()), {name: value * share for name, value in metrics.items()}
