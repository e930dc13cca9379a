"""Scenario of a plan: a recipe on a number of GPUs of one kind, and the layout of its ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache

from oreal_megatron.config import Config, ConfigError
from oreal_megatron.models import tensors
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.plan.activations import ITEMSIZE
from oreal_megatron.plan.assumptions import Assumptions
from oreal_megatron.plan.gpus import Gpu
from oreal_megatron.reshard import vllm_layout


@dataclass(frozen=True)
class Scenario:
    """A recipe, a model architecture, and the GPUs to run on."""

    config: Config
    arch: Architecture
    gpu: Gpu
    world: int
    node: int = 8  # GPUs per node
    assumed: Assumptions = field(default_factory=Assumptions)
    teacher: Architecture | None = None  # of `oreal distill`

    @property
    def model_ranks(self) -> int:
        """Number of ranks that hold one replica of a model."""
        return self.config.parallel.tensor * self.config.parallel.pipeline

    @property
    def data(self) -> int:
        """Number of data-parallel replicas, which train on different samples."""
        return self.world // (self.model_ranks * self.config.parallel.context)

    @property
    def replicas(self) -> int:
        """Number of engine replicas."""
        return self.world // self.config.engine.tensor

    @property
    def longest(self) -> int:
        """Tokens of the largest micro-batch: a sequence longer than the budget has its own."""
        return max(self.config.tokens_per_micro_batch, self.config.engine.max_model_len)

    @property
    def roles(self) -> dict[str, str]:
        """Models on each rank, with the kind of their heads."""
        rewarded = {"reward_model": "scalar"} if self.config.reward_model.enabled else {}
        return {"policy": "lm", **rewarded, "reference": "lm"}

    @property
    def sequence_tokens(self) -> float:
        """Tokens of a mean sequence, prompt and response."""
        return self.assumed.prompt_tokens + self.assumed.response_tokens

    @property
    def sequences(self) -> float:
        """Number of samples in a step."""
        keep = self.config.selection.keep
        samples_per_prompt = 2 if keep == "pair" else self.config.sampling.rollouts_per_prompt
        prompt_share = 1.0 if keep == "all" else self.assumed.mixed_share
        return self.config.data.prompts_per_step * prompt_share * samples_per_prompt

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of each data-parallel replica in a step."""
        share = self.sequences * self.sequence_tokens / self.data
        count = max(1, math.ceil(share / self.config.tokens_per_micro_batch))
        layout = self.config.parallel
        return count if layout.virtual == 1 else math.ceil(count / layout.pipeline) * layout.pipeline

    @property
    def usable(self) -> float:
        """Bytes of a GPU's memory that programs can use."""
        return self.gpu.memory_gib * 2**30 * (1 - self.assumed.driver_share)

    def elements(self, stage: int, head: str) -> int:
        """Return the parameters of a model on one rank of a pipeline stage."""
        layout = self.config.parallel
        return _elements(self.arch, layout.tensor, layout.pipeline, layout.virtual, stage, head)

    def all_elements(self, head: str) -> int:
        """Return the parameters of a complete model, without padding of the vocabulary."""
        return _all_elements(self.arch, head)

    def engine_weights(self) -> float:
        """Return the bytes of weights on one engine rank; for experts, an equal share of all."""
        itemsize, ranks = ITEMSIZE[self.config.engine_dtype], self.config.engine.tensor
        if self.arch.experts:
            return self.all_elements("lm") * itemsize / ranks
        return _engine_elements(self.arch, ranks) * itemsize

    def cache_token(self) -> float:
        """Return the bytes of one token's keys and values on an engine rank."""
        groups = max(self.arch.kv_groups // self.config.engine.tensor, 1)
        return 2 * self.arch.layers * groups * self.arch.head_dim * ITEMSIZE[self.config.engine_dtype]

    def crosses_nodes(self, ranks: int, stride: int) -> bool:
        """Return whether a group of ranks at a distance of `stride` has members on several nodes."""
        return (ranks - 1) * stride >= self.node

    def check(self) -> None:
        """Raise ConfigError for what the trainer would refuse after everything is loaded."""
        self.check_layout()
        engine = self.config.engine
        needed = self.cache_token() * engine.max_model_len / 2**30
        if needed > engine.kv_cache_gib:
            raise ConfigError(
                f"engine.kv_cache_gib is {engine.kv_cache_gib:g}, but one sequence of {engine.max_model_len} tokens "
                f"needs {needed:.2f} GiB; many run at once, so set several times that, or lower engine.max_model_len"
            )

    def check_megatron(self) -> None:
        """Raise ConfigError for a setting of section `megatron` that a run would refuse, in the same words."""
        from oreal_megatron.mcore import gpt_model  # imports Megatron, which takes seconds

        gpt_model.transformer_config(self.arch, self.config)

    def check_layout(self) -> None:
        """Raise ConfigError for what the ranks cannot share evenly."""
        layout, engine = self.config.parallel, self.config.engine
        for key, value in (
            ("--gpus", self.world),
            ("--gpus-per-node", self.node),
            ("parallel.context", layout.context),
        ):
            if value < 1:
                raise ConfigError(f"{key} is {value}; expected at least 1")
        self.arch.check_layout(layout.tensor, layout.pipeline, layout.virtual)
        self.arch.check_training(layout.tensor, layout.sequence)
        if self.world > self.node and self.world % self.node:
            raise ConfigError(
                f"{self.world} GPUs is not a multiple of {self.node} GPUs per node; set --gpus or --gpus-per-node"
            )
        if layout.sequence and layout.tensor == 1:
            raise ConfigError("parallel.sequence is set, which needs parallel.tensor of at least 2")
        self._check_divisions()
        if engine.max_model_len > self.arch.max_positions:
            raise ConfigError(
                f"engine.max_model_len is {engine.max_model_len}, but the model has only "
                f"{self.arch.max_positions} positions"
            )

    def _check_divisions(self) -> None:
        layout, engine = self.config.parallel, self.config.engine
        for what, size in (
            ("parallel.tensor x pipeline x context", self.model_ranks * layout.context),
            ("engine.tensor", engine.tensor),
        ):
            if self.world % size:
                raise ConfigError(f"{what} is {size}, which does not divide {self.world} GPUs; change it or --gpus")
        for what, count in (("attention heads", self.arch.heads), ("feed-forward units", self.arch.ffn)):
            if count % engine.tensor:
                raise ConfigError(f"engine.tensor is {engine.tensor}, which does not divide {count} {what}")
        if self.arch.kv_groups % engine.tensor and engine.tensor % self.arch.kv_groups:
            raise ConfigError(
                f"engine.tensor is {engine.tensor}: neither a divisor nor a multiple of the model's "
                f"{self.arch.kv_groups} key-value groups"
            )


@cache
def _elements(arch: Architecture, tensor: int, pipeline: int, chunks: int, stage: int, head: str) -> int:
    return sum(
        entry.shard_shape(tensor).numel()
        for chunk in range(chunks)
        for entry in tensors.entries(arch, tensor, pipeline * chunks, chunk * pipeline + stage, head)
    )


@cache
def _all_elements(arch: Architecture, head: str) -> int:
    shapes = (
        shape for entry in tensors.entries(arch, 1, 1, 0, head) for shape in tensors.hf_shapes(entry, arch).values()
    )
    return sum(math.prod(shape) for shape in shapes)


@cache
def _engine_elements(arch: Architecture, ranks: int) -> int:
    return sum(math.prod(shape) for shape in vllm_layout.parameter_shapes(arch, ranks).values())
