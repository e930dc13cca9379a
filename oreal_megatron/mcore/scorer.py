"""One model on this rank: score a batch, or train on it, through Megatron's stock pipeline schedules."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from oreal_megatron.algo import guard
from oreal_megatron.config import Config, OptimizerConfig
from oreal_megatron.mcore import adam, context_parallel, layers, parallel, varlen_attention
from oreal_megatron.mcore.cpu_shim import device_layer
from oreal_megatron.mcore.gpt_model import device
from oreal_megatron.mcore.offload import Part, Parts
from oreal_megatron.records import Batch, MicroBatch
from oreal_megatron.runtime import distributed, heartbeat

# Last stage's output [1, S, ...] of a micro-batch -> one value per action token [T], whole on every rank of the stage.
Head = Callable[[Tensor, MicroBatch], Tensor]
# Number of the micro-batch within the batch, the micro-batch, last stage's output -> loss and metrics that add up.
Objective = Callable[[int, MicroBatch, Tensor], tuple[Tensor, dict[str, Tensor]]]


class Scorer:
    """A model that is only read. Results live where Megatron leaves them: on the last pipeline stage."""

    def __init__(self, chunks: list[GPTModel], head: Head):
        self.chunks, self.head = chunks, head
        self.chunks[0].config.finalize_model_grads_func = None
        self.parts = Parts(parameters=Part(lambda: _parameters(chunks)))

    @torch.no_grad()
    def score(self, batch: Batch) -> list[Tensor] | None:
        """One value per action token [T] for each micro-batch, in order; None before the last pipeline stage."""

        def loss_function(number: int, micro_batch: MicroBatch, output: Tensor) -> tuple:
            values = self.head(output, micro_batch)
            return values.sum(), {"values": values}

        with self.parts.here("parameters"):
            outputs = self._run(batch, loss_function, forward_only=True)
        return [output["values"] for output in outputs] if parallel_state.is_pipeline_last_stage() else None

    def _run(self, batch: Batch, loss_function: Callable[..., tuple], forward_only: bool) -> list[dict[str, Tensor]]:
        def forward_step(numbered: Iterator[tuple[int, MicroBatch]], model: Any) -> tuple:
            number, micro_batch = next(numbered)
            heartbeat.beat(number)
            micro_batch = micro_batch.to(device())
            output = _forward(model, micro_batch)
            return output, lambda result: loss_function(number, micro_batch, result)

        iterators = [enumerate(batch.micro_batches) for _ in self.chunks]
        with device_layer():
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators,
                model=self.chunks,
                num_microbatches=len(batch.micro_batches),
                seq_length=len(batch.micro_batches[0].tokens),  # of no effect: variable_seq_lengths
                micro_batch_size=1,
                forward_only=forward_only,
            )


def _parameters(chunks: list[Any]) -> list[Tensor]:
    return [parameter.data for chunk in chunks for parameter in chunk.parameters()]


def _forward(model: Any, micro_batch: MicroBatch) -> Tensor:
    """One chunk's output for this rank's share of the packed rows."""
    rows = len(micro_batch.tokens)
    own = context_parallel.own_rows(rows, micro_batch.tokens.device)
    plan = varlen_attention.AttentionPlan(
        varlen_attention.segments(micro_batch.sequence_offsets, context_parallel.own_chunks(rows)), own.device
    )
    tokens, positions = micro_batch.tokens[own], micro_batch.positions[own]
    return model(tokens[None], positions[None], None, packed_seq_params=layers.Packed(positions, plan))


class Trainer(Scorer):
    """A model with gradient buffers and a distributed AdamW. `updates` counts the steps that were taken."""

    def __init__(self, chunks: list[GPTModel], head: Head, config: Config, optimizer: OptimizerConfig):
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=config.parallel.overlap,
            overlap_param_gather=config.parallel.overlap,
        )
        adam.use_torch()
        with device_layer():
            wrapped = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
            self.optimizer: MegatronOptimizer = get_megatron_optimizer(_optimizer_config(config, optimizer), wrapped)
        adam.allocate_state(self.optimizer)
        self.config, self.updates, self.guard_state = config, 0, guard.GuardState()
        super().__init__(wrapped, head)
        megatron = self.chunks[0].config
        megatron.finalize_model_grads_func = _sum_gradients
        if config.parallel.overlap:  # until the last micro-batch, gradients only add up on their rank
            waiting = [chunk.no_sync for chunk in self.chunks]
            megatron.no_sync_func = waiting if len(waiting) > 1 else waiting[0]
        gradients = [buffer.grad_data for chunk in self.chunks for buffer in chunk.buffers]
        self.parts["gradients"] = Part(lambda: gradients, kept=False)  # every update begins with zeros
        self.parts["optimizer"] = Part(self._optimizer_tensors)
        if config.offload:
            self.parts.leave()

    def train(self, batch: Batch, objective: Objective, learning_rate: float) -> dict[str, float]:
        """Take one optimizer step on the whole batch unless the guard skips it; return metrics.

        Metrics are summed over micro-batches and data-parallel ranks.
        """

        def loss_function(number: int, micro_batch: MicroBatch, output: Tensor) -> tuple:
            loss, metrics = objective(number, micro_batch, output)
            # Megatron divides a two-value result by the number of micro-batches; the middle value prevents it.
            return loss, torch.zeros((), dtype=torch.int, device=loss.device), metrics

        with device_layer(), self.parts.here(*self.parts):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            outputs = self._run(batch, loss_function, forward_only=False)
            self.optimizer.prepare_grads()
            metrics = {**_added(outputs), "gradient_norm": _agreed(self.optimizer.get_grad_norm())}
            return {**metrics, "learning_rate": learning_rate, **self._step(metrics, learning_rate)}

    def _step(self, metrics: dict[str, float], learning_rate: float) -> dict[str, float]:
        """Let the optimizer step unless the guard decides to skip; return metrics of the decision."""
        decision = guard.decide(self.guard_state, metrics, self.config.guard)
        self.guard_state = decision.state
        if not decision.skip:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.updates += 1
        # With parallel.overlap, what a replica has not gathered yet counts as it was; its owner counts the new one.
        largest = max(distributed.all_gather_object(_largest(_parameters(self.chunks))))
        spikes = {"gradient_norm_limit": decision.norm_limit} if math.isfinite(decision.norm_limit) else {}
        return {**spikes, "largest_weight": largest, "updates": self.updates, **self.guard_state.metrics()}

    def skip(self) -> dict[str, float]:
        """Skip a step without computing it; return the guard's counts."""
        self.guard_state = self.guard_state.after_skip()
        return self.guard_state.metrics()

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """Have the parameters on the device, and whole: for all who read them other than by a forward pass. Collective.

        With `parallel.overlap` a replica has only its own share of an update, until the next forward gathers the rest.
        """
        with self.parts.here("parameters"):
            if self.chunks[0].ddp_config.overlap_param_gather:
                for chunk in self.chunks:
                    chunk.start_param_sync(force_sync=True)
            yield

    def _optimizer_tensors(self) -> list[Tensor]:
        """Main weights and moments, less what lies in the parameters' own memory."""
        parameters = {tensor.untyped_storage()._cdata for tensor in _parameters(self.chunks)}
        return [held for held in adam.tensors(self.optimizer) if held.untyped_storage()._cdata not in parameters]


def _optimizer_config(config: Config, optimizer: OptimizerConfig) -> MegatronOptimizerConfig:
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,  # of all parameters: Megatron's exceptions act in its own scheduler only
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        clip_grad=optimizer.clip_grad,
        bf16=config.model.dtype == "bfloat16",
        params_dtype=torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap,
    )


def _sum_gradients(models: list[Any], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Reduce gradients over ranks without dividing by tokens: the losses are divided by the step's counts already."""
    finalize_model_grads(models, None, **kwargs)


def _added(outputs: list[dict[str, Tensor]]) -> dict[str, float]:
    """Metrics of the last stage's micro-batches, summed over the world, each data-parallel rank counted once."""
    mine: dict[str, float] = {}
    for metrics in outputs if parallel.share() else []:
        for name, value in metrics.items():
            mine[name] = mine.get(name, 0.0) + float(value)
    totals: dict[str, float] = {}
    for theirs in distributed.all_gather_object(mine):
        for name, value in theirs.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


def _agreed(gradient_norm: Any) -> float:
    """The first rank's: all ranks decide on one number, whatever their own reduction rounded to."""
    return distributed.all_gather_object(float(gradient_norm))[0]


def _largest(tensors: list[Tensor]) -> float:
    """The largest magnitude; infinite where there is a nan."""
    ends = torch.stack([end.float() for tensor in tensors for end in tensor.aminmax()])
    return float(ends.abs().max().nan_to_num(nan=math.inf, posinf=math.inf))
