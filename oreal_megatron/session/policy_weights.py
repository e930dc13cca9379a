"""The policy's weights on their way out of Megatron: to the engine, to a Hugging Face folder, into checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oreal_megatron.convert import megatron_folder, to_hf
from oreal_megatron.reshard import gather_transport
from oreal_megatron.reshard.byte_counter import ByteCounter
from oreal_megatron.reshard.overlaps import ReshardLayout
from oreal_megatron.reshard.weight_sync import WeightSync
from oreal_megatron.runtime import distributed
from oreal_megatron.session.inputs import Inputs

log = logging.getLogger(__name__)


def full_tensors(policy: Any, counted: ByteCounter | None = None) -> Iterator[tuple[str, Tensor]]:
    """The policy's weights in Hugging Face terms, on every rank. Collective: every rank must exhaust it. Bytes that
    travel are added to `counted`, for whoever asks."""
    from oreal_megatron.mcore import gpt_model, parallel

    config = policy.config
    layout = gather_transport.GatherGroups(
        *parallel.groups(), gpt_model.DTYPES[config.model.dtype], gpt_model.device(), config.parallel.virtual
    )
    with policy.readable():
        yield from gather_transport.full_tensors(
            policy.named_shards(), policy.arch, layout, counted or ByteCounter(distributed.node_size())
        )


def describe(inputs: Inputs, name: str, checkpoint: Path) -> None:
    """Write into a checkpoint of "policy" or "reward_model" which model it is, so that it can be converted alone."""
    head = "scalar" if name == "reward_model" else "lm"
    megatron_folder.describe(inputs.folder, checkpoint, head, getattr(torch, inputs.config.model.dtype))


def connect(policy: Any, engine: Any) -> WeightSync:
    """What hands the policy's weights over to the engine. Says once by which transport. Collective."""
    config, cut = policy.config, policy.config.parallel
    layout = ReshardLayout(
        policy.arch,
        cut.tensor,
        cut.pipeline,
        cut.virtual,
        config.engine.tensor,
        distributed.world_size(),
        distributed.node_size(),
    )
    buffer = config.engine.buffer_mib * 2**20
    full = partial(full_tensors, policy)
    weight_sync = WeightSync(
        layout, config.engine.transport, buffer, policy.named_shards, full, engine, policy.readable
    )
    log.info("weight sync: %s", weight_sync.description)
    return weight_sync


def save_policy(inputs: Inputs, policy: Any, path: Path) -> None:
    """Write the policy as a Hugging Face folder, from the first rank. Collective."""
    tensors = full_tensors(policy)
    if distributed.rank() == 0:
        dtype = getattr(torch, inputs.config.model.dtype)
        to_hf.save(path, inputs.folder.path, inputs.folder.config, dtype, tensors)
    else:
        for _ in tensors:  # take part in the collectives
            pass
