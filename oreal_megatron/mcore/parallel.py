"""The process group, Megatron's parallel groups on top of it, and where this rank stands in them."""

from __future__ import annotations

import math
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed.rendezvous import rendezvous

from oreal_megatron.config import ConfigError, ParallelConfig, WatchdogConfig
from oreal_megatron.mcore.cpu_shim import device_layer
from oreal_megatron.models import flops
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.records import PackingSpec


def start_process_group(timeout_s: float = WatchdogConfig.collective_s) -> None:
    """Join torchrun's group (gloo on CPU, NCCL plus gloo on GPUs); alone when started without torchrun."""
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    if os.environ.get("MASTER_PORT", "0") == "0" and os.environ["WORLD_SIZE"] != "1":
        raise ConfigError(
            "MASTER_PORT is 0, at which the processes would wait for each other for ever; start them with "
            "torchrun --standalone on one machine, or name a free port with --master-port"
        )
    os.environ.setdefault("MASTER_PORT", "0")
    timeout = timedelta(seconds=timeout_s)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        backend, store=dist.PrefixStore(_start(), store), rank=rank, world_size=world, timeout=timeout
    )


def _start() -> str:
    """Which start by torchrun this is, where its store outlives one: in torch 2.13 `--max-restarts` keeps the
    store and with it the addresses of ranks that are gone, which those of the next start would try to reach."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return "new store"
    if int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) and os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        raise ConfigError(
            "torchrun --max-restarts on several machines needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
            "environment: else ranks that are started again look for each other where those before them were"
        )
    return f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}"  # counted by each machine for itself


def start_megatron(config: ParallelConfig, seed: int, timeout_s: float = WatchdogConfig.collective_s) -> None:
    """Megatron's groups and random-number tracker (which it wants even for evaluation)."""
    with device_layer():
        virtual = config.virtual if config.virtual > 1 else None
        parallel_state.initialize_model_parallel(
            config.tensor,
            config.pipeline,
            virtual,
            context_parallel_size=config.context,
            distributed_timeout_minutes=math.ceil(timeout_s / 60),
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def stop(engine: Any = None) -> None:
    """Leave together. The engine goes before the process group, which vLLM 0.31 ends itself."""
    dist.barrier()
    parallel_state.destroy_model_parallel()
    if engine:
        engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def packing_spec(tokens_per_micro_batch: int, arch: Architecture | None = None) -> PackingSpec:
    """Return how this rank packs samples. Without `arch`, attention is taken to cost nothing.

    Megatron's interleaved schedule takes micro-batches in groups of as many as there are pipeline stages. Tokens are
    shared by context-parallel ranks in two chunks each, and these by tensor-parallel ranks when sequence-parallel.
    """
    interleaved = parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None
    context_ranks = parallel_state.get_context_parallel_world_size()
    chunks = 2 * context_ranks if context_ranks > 1 else 1
    return PackingSpec(
        tokens_per_micro_batch,
        rank=parallel_state.get_data_parallel_rank(),
        ranks=parallel_state.get_data_parallel_world_size(),
        micro_batch_multiple=parallel_state.get_pipeline_model_parallel_world_size() if interleaved else 1,
        token_multiple=parallel_state.get_tensor_model_parallel_world_size() * chunks,
        even_tokens=flops.even_tokens(arch) if arch else math.inf,
    )


def share() -> tuple[int, int] | None:
    """The data-parallel replica that this rank speaks for, and how many there are: one rank of each holds what comes
    out of the last pipeline stage. None on the others."""
    first = parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_context_parallel_rank() == 0
    if not (first and parallel_state.is_pipeline_last_stage()):
        return None
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def tensor_and_pipeline_groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Return the groups over tensor-parallel ranks and over pipeline stages in which this rank is."""
    return parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()
