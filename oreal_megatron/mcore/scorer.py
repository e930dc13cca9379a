"""Scoring: forward passes of one model over a batch, through Megatron's stock pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from oreal_megatron.mcore import context_parallel, layers, non_finite, varlen_attention
from oreal_megatron.mcore.gpt_model import device
from oreal_megatron.mcore.megatron_patches import cpu_shim
from oreal_megatron.mcore.offload import MemoryPart, MemoryParts
from oreal_megatron.records import Batch, MicroBatch
from oreal_megatron.runtime import heartbeat

# Last stage's output [1, S, ...] of a micro-batch -> one value per action token [T], complete on every rank of the
# stage.
Head = Callable[[Tensor, MicroBatch], Tensor]


class MegatronScorer:
    """Forward passes of one model; base class of MegatronTrainer. Results stay on the last pipeline stage."""

    def __init__(self, chunks: list[GPTModel], head: Head):
        self.chunks, self.head = chunks, head
        self.chunks[0].config.finalize_model_grads_func = None
        self.parts = MemoryParts(parameters=MemoryPart(lambda: parameters(chunks)))
        self.reading_changes_nothing = True

    def score(self, batch: Batch) -> list[Tensor] | None:
        """Return one value per action token [T] for each micro-batch; None before the last pipeline stage."""
        return self.read_outputs(batch, self.head)

    @torch.no_grad()
    def read_outputs(self, batch: Batch, read: Head) -> list[Tensor] | None:
        """Return the tensor that `read` makes of the output for each micro-batch; None before the last stage."""

        def loss_function(number: int, micro_batch: MicroBatch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            values = read(output, micro_batch)
            return values.sum(), {"values": values}

        with self.parts.on_device("parameters", read_only=self.reading_changes_nothing):
            outputs = self._run(batch, loss_function, forward_only=True)
        return [output["values"] for output in outputs] if parallel_state.is_pipeline_last_stage() else None

    def find_non_finite(self, batch: Batch) -> str:
        """Describe the first value of this rank's model that is not finite; "" if there is none. Collective.

        Weights come first; if they are finite, the outputs of modules in a forward pass over the batch.
        """
        with non_finite.watched_outputs(self.chunks) as modules:
            values = self.score(batch)
        with self.parts.on_device("parameters"):
            parameter = non_finite.first_parameter(self.chunks)
        if parameter:
            return parameter
        if modules:
            return f"all weights are finite, but the output of {modules[0]} is not"
        wrong = any(not tensor.isfinite().all() for tensor in values or [])
        return "weights and hidden states are finite, but the values of the output layer are not" if wrong else ""

    def _run(
        self, batch: Batch, loss_function: Callable[..., tuple[Any, ...]], forward_only: bool
    ) -> list[dict[str, Tensor]]:
        """Run Megatron's schedule; return the last element of `loss_function`'s result for each micro-batch."""

        def forward_step(numbered: Iterator[tuple[int, MicroBatch]], model: nn.Module) -> tuple[Tensor, Any]:
            number, micro_batch = next(numbered)
            heartbeat.beat(number)
            micro_batch = micro_batch.to(device())
            output = _forward(model, micro_batch)
            return output, lambda result: loss_function(number, micro_batch, result)

        iterators = [enumerate(batch.micro_batches) for _ in self.chunks]
        with cpu_shim():
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators,
                model=self.chunks,
                num_microbatches=len(batch.micro_batches),
                seq_length=len(batch.micro_batches[0].tokens),  # without effect: variable_seq_lengths
                micro_batch_size=1,
                forward_only=forward_only,
            )


def parameters(chunks: list[Any]) -> list[Tensor]:
    """Return the parameters of a model's chunks."""
    return [parameter.data for chunk in chunks for parameter in chunk.parameters()]


def _forward(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Compute one chunk's output for this rank's share of the packed rows."""
    rows = len(micro_batch.tokens)
    own_rows = context_parallel.own_rows(rows, micro_batch.tokens.device)
    plan = varlen_attention.AttentionPlan(
        varlen_attention.segments(micro_batch.sequence_offsets, context_parallel.own_chunks(rows)), own_rows.device
    )
    tokens, positions = micro_batch.tokens[own_rows], micro_batch.positions[own_rows]
    return model(tokens[None], positions[None], None, packed_seq_params=layers.PackedSequences(positions, plan))
