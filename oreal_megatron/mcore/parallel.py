"""Process group, Megatron's parallel groups, and the position of this rank in them."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed.rendezvous import rendezvous

from oreal_megatron.config import ConfigError, ParallelConfig, WatchdogConfig
from oreal_megatron.mcore.megatron_patches import cpu_shim
from oreal_megatron.models import flops
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.records import PackingSpec

log = logging.getLogger(__name__)
WAIT_S = 15.0  # until a process says that it waits for the others


class ClosableEngine(Protocol):
    """An engine that can be shut down."""

    def close(self) -> None:
        """End the engine."""
        ...


def start_process_group(timeout_s: float = WatchdogConfig.collective_s) -> None:
    """Join torchrun's process group (gloo on CPU, NCCL and gloo on GPUs); without torchrun, a group of one."""
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(key, value)
    if os.environ["WORLD_SIZE"] == "1":  # a process alone meets itself; the address may be left over from another job
        alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_USE_AGENT_STORE": "False"}
        os.environ.update(alone, RANK="0")
    else:
        _check_address()
    timeout = timedelta(seconds=timeout_s)
    backend, device = "gloo", None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
        # Sums over the vocabulary may be split among thread blocks; their partial results must stay fp32.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    with _announced_wait():
        store, rank, world = next(rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(_restart_prefix(), store),
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=device,  # NCCL connects now: a broken network shows at the start, not in the first collective
    )


def _check_address() -> None:
    """Raise ConfigError for a meeting point at which the processes would wait for each other forever."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "0")
    fix = "start the processes with `oreal --processes N`, or with torchrun"
    if port == "0":
        raise ConfigError(
            f"MASTER_PORT is 0, so the processes would wait for each other forever; {fix} --standalone on one machine, "
            "or give a free port with --master-port"
        )
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but MASTER_ADDR is {address!r}, which does not resolve "
            f"({error}). If it is left over from another job, unset WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT and "
            f"{fix}"
        ) from None


@contextlib.contextmanager
def _announced_wait() -> Iterator[None]:
    """Say what this process waits for if its peers do not come within WAIT_S."""
    timer = threading.Timer(
        WAIT_S,
        lambda: log.warning(
            "still waiting for %s processes at MASTER_ADDR=%s MASTER_PORT=%s; if these are left over from another job, "
            "unset them and WORLD_SIZE",
            *(os.environ.get(key) for key in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")),
        ),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _restart_prefix() -> str:
    """Return a key prefix that is new for every restart by torchrun.

    In torch 2.13 `--max-restarts` keeps the store, and with it the addresses of ended ranks, to which the restarted
    ones would try to connect.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return "new store"
    if int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) and os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        raise ConfigError(
            "torchrun --max-restarts on several machines needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
            "environment; without it, restarted ranks connect to the addresses of the ended ones"
        )
    return f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}"  # each machine counts its own


def start_megatron(config: ParallelConfig, seed: int, timeout_s: float = WatchdogConfig.collective_s) -> None:
    """Create Megatron's groups and its random-number tracker, which it needs even for evaluation."""
    with cpu_shim():
        virtual = config.virtual if config.virtual > 1 else None
        parallel_state.initialize_model_parallel(
            config.tensor,
            config.pipeline,
            virtual,
            context_parallel_size=config.context,
            distributed_timeout_minutes=math.ceil(timeout_s / 60),
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def stop(engine: ClosableEngine | None = None) -> None:
    """Leave all groups. Collective. The engine is closed first: vLLM 0.31 destroys the process group itself."""
    dist.barrier()
    parallel_state.destroy_model_parallel()
    if engine:
        engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def packing_spec(tokens_per_micro_batch: int, arch: Architecture | None = None) -> PackingSpec:
    """Return the packing spec of this rank. Without `arch`, attention is assumed to cost nothing.

    Megatron's interleaved schedule takes micro-batches in groups as large as the number of pipeline stages. Tokens are
    shared by context-parallel ranks in two chunks each, and a chunk by tensor-parallel ranks (sequence parallelism).
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


def replica_share() -> tuple[int, int] | None:
    """Return (data-parallel rank, number of replicas) on the one rank per replica that reports its results; else None.

    It is the first tensor- and context-parallel rank of the last pipeline stage, which holds the outputs.
    """
    is_first = parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_context_parallel_rank() == 0
    if not (is_first and parallel_state.is_pipeline_last_stage()):
        return None
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def tensor_and_pipeline_groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Return the groups over tensor-parallel ranks and over pipeline stages in which this rank is."""
    return parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()
