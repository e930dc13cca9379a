"""Hooks on transformer layers: read their outputs in a forward pass, or add gradients to them in a backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from oreal_megatron.mcore import context_parallel
from oreal_megatron.mcore.gpt_model import unwrap
from oreal_megatron.records import MicroBatch

# Number of the micro-batch, index within `layers`, the layer's output [S', 1, H] -> the output to continue with.
Visit = Callable[[int, int, Tensor], Tensor]


@contextlib.contextmanager
def visited_layers(chunk: Any, layers: Sequence[int], visit: Visit) -> Iterator[None]:
    """Call `visit` with the output of these layers of a stage with one chunk, in every forward pass.

    Recomputation in a backward calls it again, for the micro-batch of the last forward pass: without pipeline stages,
    Megatron's schedule runs the backward of a micro-batch before the forward of the next.
    """
    model, number = unwrap(chunk), -1

    def count(module: Any, arguments: Any) -> None:
        nonlocal number
        number += 1

    def replace(index: int, module: Any, arguments: Any, output: tuple[Tensor, Any]) -> tuple[Any, ...]:
        return visit(number, index, output[0]), *output[1:]

    handles = [model.register_forward_pre_hook(count)]
    for index, layer in enumerate(layers):
        handles.append(model.decoder.layers[layer].register_forward_hook(partial(replace, index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def action_rows(micro_batch: MicroBatch, sequence_parallel: bool) -> Tensor:
    """Return the rows, of those that a layer outputs on this rank, that predict action tokens."""
    own, _ = context_parallel.own_actions(micro_batch, micro_batch.action_index)
    rows = own.action_index
    if sequence_parallel:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        size = len(micro_batch.tokens) // context_parallel.world_size() // ranks
        first = parallel_state.get_tensor_model_parallel_rank() * size
        rows = rows[(rows >= first) & (rows < first + size)] - first
    return rows


def select_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """Return rows [n, H] of a layer's output [S', 1, H]."""
    return hidden.squeeze(1).index_select(0, rows)


class _AddGradient(torch.autograd.Function):
    """Identity whose backward passes a given gradient to features."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, features: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = features.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return incoming, gradient.to(ctx.dtype), None


def add_gradient(
    hidden: Tensor,  # [S', 1, H]
    features: Tensor,  # [n, C], computed from hidden
    gradient: Tensor,  # [n, C], of the step's loss, whose own gradient is 1 in Megatron's schedules
) -> Tensor:
    """Return `hidden`, in whose backward `gradient` flows into the features as well."""
    return _AddGradient.apply(hidden, features, gradient)
