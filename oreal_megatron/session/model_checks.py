"""Checks of a configuration against the model, the number of processes and vLLM, before anything is loaded.

Each raises ConfigError: what was found, what is expected, how to fix it.
"""

from __future__ import annotations

import os

from oreal_megatron.config import Config, ConfigError
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.runtime import distributed


def check_world(config: Config, arch: Architecture) -> None:
    """Check that the number of processes fits the layouts of trainer and engine."""
    world, layout = distributed.world_size(), config.parallel
    trainer = ("parallel.tensor x pipeline x context", layout.tensor * layout.pipeline * layout.context)
    for what, size in (trainer, ("engine.tensor", config.engine.tensor)):
        if world % size:
            raise ConfigError(
                f"{world} processes were started, but {what} is {size}; start a multiple of {size} with "
                "torchrun --nproc-per-node, or change the layout"
            )
    check_engine(config.engine.tensor, arch)


def check_engine(size: int, arch: Architecture) -> None:
    """Check that vLLM can split the model over `size` ranks; it would fail only after everything is loaded."""
    groups = arch.kv_groups
    for what, amount in (("attention heads", arch.heads), ("feed-forward units", arch.ffn)):
        if amount % size:
            raise ConfigError(f"engine.tensor is {size}, which does not divide {amount} {what}")
    if groups % size and size % groups:
        raise ConfigError(f"engine.tensor is {size}; expected a divisor or a multiple of {groups} key-value groups")
    if len(arch.names.qkv) == 1 and size > groups:
        raise ConfigError(
            f"engine.tensor is {size}, but vLLM cannot share InternLM2's {groups} key-value groups among more ranks; "
            f"set it to at most {groups}"
        )


def check_allocator(config: Config) -> None:
    """Check that expandable segments are off: they exclude the allocator of vLLM's sleep mode."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if config.engine.sleep and "expandable_segments:true" in os.environ.get(name, "").lower():
            raise ConfigError(
                f"{name} asks for expandable segments, which exclude vLLM's sleep mode; remove them from it, or set "
                "engine.sleep=false"
            )


def check_kv_cache(config: Config, arch: Architecture) -> None:
    """Check that one sequence of full length fits the KV cache; vLLM would fail only after everything is loaded."""
    itemsize = {"float32": 4, "bfloat16": 2}[config.engine_dtype]
    groups = max(arch.kv_groups // config.engine.tensor, 1)
    needed = 2 * arch.layers * groups * arch.head_dim * itemsize * config.engine.max_model_len / 2**30
    if needed > config.engine.kv_cache_gib:
        raise ConfigError(
            f"engine.kv_cache_gib is {config.engine.kv_cache_gib:g}, but one sequence of {config.engine.max_model_len} "
            f"tokens needs {needed:.2f}; many run at once, so set several times that, or lower engine.max_model_len"
        )
