"""One model on this rank: score a batch, or train on it, through Megatron's stock pipeline schedules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from oreal_megatron import ranks
from oreal_megatron.config import Config, Optimizer
from oreal_megatron.mcore import adam
from oreal_megatron.mcore.cpu import device_layer
from oreal_megatron.mcore.model import device
from oreal_megatron.records import Batch, MicroBatch

logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)  # announces that it does nothing

# Last stage's output [B, S, ...] of a micro-batch -> one value per action token [T].
Head = Callable[[Tensor, MicroBatch], Tensor]
# Number of the micro-batch within the batch, the micro-batch, last stage's output -> loss and metrics that add up.
Objective = Callable[[int, MicroBatch, Tensor], tuple[Tensor, dict[str, Tensor]]]


class Scorer:
    """A model that is only read. Results live where Megatron leaves them: on the last pipeline stage."""

    def __init__(self, chunks: list[GPTModel], head: Head):
        self.chunks, self.head = chunks, head
        self.chunks[0].config.finalize_model_grads_func = None

    @torch.no_grad()
    def score(self, batch: Batch) -> list[Tensor] | None:
        """One value per action token [T] for each micro-batch, in order; None before the last pipeline stage."""

        def loss_function(number: int, micro_batch: MicroBatch, output: Tensor) -> tuple:
            values = self.head(output, micro_batch)
            return values.sum(), {"values": values}

        outputs = self._run(batch, loss_function, forward_only=True)
        return [output["values"] for output in outputs] if parallel_state.is_pipeline_last_stage() else None

    def _run(self, batch: Batch, loss_function: Callable[..., tuple], forward_only: bool) -> list[dict[str, Tensor]]:
        def forward_step(numbered: Iterator[tuple[int, MicroBatch]], model: Any) -> tuple:
            number, micro_batch = next(numbered)
            micro_batch = micro_batch.to(device())
            output = model(micro_batch.tokens, micro_batch.positions, None)
            return output, lambda result: loss_function(number, micro_batch, result)

        iterators = [enumerate(batch.micro_batches) for _ in self.chunks]
        with device_layer():
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators,
                model=self.chunks,
                num_microbatches=len(batch.micro_batches),
                seq_length=batch.micro_batches[0].tokens.shape[1],  # of no effect: variable_seq_lengths
                micro_batch_size=1,
                forward_only=forward_only,
            )


class Trainer(Scorer):
    """A model with gradient buffers and a distributed AdamW."""

    def __init__(self, chunks: list[GPTModel], head: Head, config: Config, optimizer: Optimizer):
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, check_for_nan_in_grad=True
        )
        with device_layer():
            wrapped = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
            self.optimizer: MegatronOptimizer = get_megatron_optimizer(_optimizer_config(config, optimizer), wrapped)
        adam.allocate_state(self.optimizer)
        super().__init__(wrapped, head)
        self.chunks[0].config.finalize_model_grads_func = _sum_gradients

    def train(self, batch: Batch, objective: Objective, learning_rate: float) -> dict[str, float]:
        """One optimizer step on the whole batch; metrics summed over micro-batches and data-parallel ranks."""

        def loss_function(number: int, micro_batch: MicroBatch, output: Tensor) -> tuple:
            loss, metrics = objective(number, micro_batch, output)
            # Megatron divides a two-value result by the number of micro-batches; the middle value prevents it.
            return loss, torch.zeros((), dtype=torch.int, device=loss.device), metrics

        with device_layer():
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            outputs = self._run(batch, loss_function, forward_only=False)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            _, gradient_norm, _ = self.optimizer.step()
        return {**_added(outputs), "gradient_norm": float(gradient_norm), "learning_rate": learning_rate}


def _optimizer_config(config: Config, optimizer: Optimizer) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,  # of all parameters: Megatron's exceptions act in its own scheduler only
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        clip_grad=optimizer.clip_grad,
        bf16=config.model.dtype == "bfloat16",
        params_dtype=torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32,
        use_distributed_optimizer=True,
    )


def _sum_gradients(models: list[Any], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Reduce gradients over ranks without dividing by tokens: the losses are divided by the step's counts already."""
    finalize_model_grads(models, None, **kwargs)


def _added(outputs: list[dict[str, Tensor]]) -> dict[str, float]:
    """Metrics of the last stage's micro-batches, summed over the world, each data-parallel rank counted once."""
    counted = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
    mine: dict[str, float] = {}
    for metrics in outputs if counted else []:
        for name, value in metrics.items():
            mine[name] = mine.get(name, 0.0) + float(value)
    totals: dict[str, float] = {}
    for theirs in ranks.gather(mine):
        for name, value in theirs.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals
