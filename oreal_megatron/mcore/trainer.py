"""Training: optimizer steps of one model, with gradient buffers and Megatron's distributed AdamW.

Policy and token-level reward model: trained_models.py.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from torch import Tensor

from oreal_megatron.algo import guard
from oreal_megatron.config import Config, OptimizerConfig
from oreal_megatron.mcore import adam, megatron_patches, non_finite, parallel
from oreal_megatron.mcore.megatron_patches import cpu_shim
from oreal_megatron.mcore.offload import MemoryPart
from oreal_megatron.mcore.scorer import Head, MegatronScorer, parameters
from oreal_megatron.records import Batch, MicroBatch
from oreal_megatron.runtime import distributed

log = logging.getLogger(__name__)

# Metrics of `train` that describe the model after the update; the others describe its samples.
STATE_METRICS = ("learning_rate", "gradient_norm_limit", "largest_weight", "updates", "skipped", "consecutive_skips")

# Number of the micro-batch within the batch, the micro-batch, last stage's output -> loss and metrics that add up.
Objective = Callable[[int, MicroBatch, Tensor], tuple[Tensor, dict[str, Tensor]]]


class MegatronTrainer(MegatronScorer):
    """A model with gradient buffers and a distributed AdamW. `updates` counts the optimizer steps taken.

    Implements saved_model.SavedModel.
    """

    saved_parts: tuple[str, ...] = ("parameters", "optimizer")

    def __init__(self, chunks: list[GPTModel], head: Head, config: Config, optimizer: OptimizerConfig):
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=config.parallel.overlap,
            overlap_param_gather=config.parallel.overlap,
        )
        megatron_patches.use_torch_adam()
        with cpu_shim():
            wrapped = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
            self.optimizer_config = _optimizer_config(config, optimizer)
            self.optimizer: MegatronOptimizer = get_megatron_optimizer(self.optimizer_config, wrapped)
        adam.allocate_state(self.optimizer)
        self.config, self.updates, self.guard_state = config, 0, guard.GuardState()
        super().__init__(wrapped, head)
        # A forward gathers the weights of the last update where that was overlapped.
        self.reading_changes_nothing = not config.parallel.overlap
        megatron = self.chunks[0].config
        megatron.finalize_model_grads_func = _reduce_gradients
        if config.parallel.overlap:  # until the last micro-batch, gradients only add up on their rank
            no_sync = [chunk.no_sync for chunk in self.chunks]
            megatron.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        gradients = [buffer.grad_data for chunk in self.chunks for buffer in chunk.buffers]
        self.parts["gradients"] = MemoryPart(lambda: gradients, preserve=False)  # every update begins with zeros
        self.parts["optimizer"] = MemoryPart(self._optimizer_tensors)
        if config.offload:
            self.parts.offload()

    def train(self, batch: Batch, objective: Objective, learning_rate: float) -> dict[str, float]:
        """Take one optimizer step on the whole batch unless the guard skips it; return metrics.

        Metrics are summed over micro-batches and data-parallel ranks.
        """

        def loss_function(
            number: int, micro_batch: MicroBatch, output: Tensor
        ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, metrics = objective(number, micro_batch, output)
            # Megatron divides a two-value result by the number of micro-batches; the middle value prevents it.
            return loss, torch.zeros((), dtype=torch.int, device=loss.device), metrics

        with cpu_shim(), self.parts.on_device(*self.parts):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            outputs = self._run(batch, loss_function, forward_only=False)
            self.optimizer.prepare_grads()
            metrics = {**_sum_metrics(outputs), "gradient_norm": _first_ranks_value(self.optimizer.get_grad_norm())}
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
        # With parallel.overlap, a replica's copy of weights that it has not gathered yet is the old one; the owner
        # reports the new one.
        own_largest = _largest_magnitude(parameters(self.chunks))
        if not math.isfinite(own_largest):  # the guard stops the run on all ranks
            log.error("after update %d: %s", self.updates, non_finite.first_parameter(self.chunks))
        largest = max(distributed.all_gather_object(own_largest))
        spikes = {"gradient_norm_limit": decision.norm_limit} if math.isfinite(decision.norm_limit) else {}
        return {**spikes, "largest_weight": largest, "updates": self.updates, **self.guard_state.metrics()}

    def skip(self) -> dict[str, float]:
        """Skip a step without computing it; return the guard's counts."""
        self.guard_state = self.guard_state.after_skip()
        return self.guard_state.metrics()

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """Keep the parameters on the device, complete, for readers other than a forward pass. Collective.

        With `parallel.overlap` a replica has only its own share of an update until the next forward gathers the rest.
        """
        with self.parts.on_device("parameters", read_only=self.reading_changes_nothing):
            if self.chunks[0].ddp_config.overlap_param_gather:
                for chunk in self.chunks:
                    chunk.start_param_sync(force_sync=True)
            yield

    @property
    def saved_chunks(self) -> list[GPTModel]:
        """Chunks of this rank's stage, without their gradient buffers."""
        return [chunk.module for chunk in self.chunks]

    @property
    def saved_optimizer(self) -> MegatronOptimizer:
        """The optimizer."""
        return self.optimizer

    def small_state(self) -> dict[str, Any]:
        """Return the number of updates and the history of the guard."""
        return {"updates": self.updates, "past": self.guard_state.to_checkpoint()}

    def restore_small_state(self, state: dict[str, Any]) -> None:
        """Take the values of a checkpoint and the states of its optimizer; settings stay those of the configuration."""
        self.optimizer.load_state_dict(state["optimizer"])
        adam.separate_steps(self.optimizer)
        adam.apply_settings(self.optimizer, self.optimizer_config)
        self.updates, self.guard_state = state["updates"], guard.GuardState.from_checkpoint(state["past"])

    def _optimizer_tensors(self) -> list[Tensor]:
        """Return main weights and moments, except those in the parameters' own memory."""
        storages = {tensor.untyped_storage()._cdata for tensor in parameters(self.chunks)}
        tensors = adam.state_tensors(self.optimizer)
        return [tensor for tensor in tensors if tensor.untyped_storage()._cdata not in storages]


def mean_metrics(updates: Sequence[Mapping[str, float]], tokens: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Return the mean of each metric over the updates that have it, and the state of the model after the last one.

    `tokens`: for each update the numbers of tokens behind its means over tokens; other metrics count each update once.
    """
    if len(updates) == 1:
        return dict(updates[0])
    means = {name: value for name, value in updates[-1].items() if name in STATE_METRICS}
    for name in dict.fromkeys(name for update in updates for name in update if name not in STATE_METRICS):
        rows = [(row[name], sizes.get(name, 1)) for row, sizes in zip(updates, tokens, strict=True) if name in row]
        means[name] = sum(value * size for value, size in rows) / sum(size for _, size in rows)
    return means


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


def _reduce_gradients(models: list[Any], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Reduce gradients over ranks without dividing by tokens: the losses are divided by the step's counts already."""
    finalize_model_grads(models, None, **kwargs)


def _sum_metrics(outputs: list[dict[str, Tensor]]) -> dict[str, float]:
    """Sum the metrics of the last stage's micro-batches over the world, each data-parallel rank counted once."""
    own: dict[str, float] = {}
    for metrics in outputs if parallel.replica_share() else []:
        for name, value in metrics.items():
            own[name] = own.get(name, 0.0) + float(value)
    totals: dict[str, float] = {}
    for sums in distributed.all_gather_object(own):
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


def _first_ranks_value(gradient_norm: Any) -> float:
    """Return the first rank's value, so that all ranks decide on one number however their reduction rounded."""
    return distributed.all_gather_object(float(gradient_norm))[0]


def _largest_magnitude(tensors: list[Tensor]) -> float:
    """Return the largest magnitude; infinity if any element is nan."""
    extremes = torch.stack([extreme.float() for tensor in tensors for extreme in tensor.aminmax()])
    return float(extremes.abs().max().nan_to_num(nan=math.inf, posinf=math.inf))
