"""Weights on their way out of Megatron: to the engine, into a Hugging Face folder, into a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from oreal_megatron.convert import megatron_folder, to_hf
from oreal_megatron.models import architecture
from oreal_megatron.protocols import WeightReceiver
from oreal_megatron.reshard import weight_sync
from oreal_megatron.runtime import distributed
from oreal_megatron.session.inputs import Inputs

log = logging.getLogger(__name__)
HEADS = {"policy": "lm", "reward_model": "scalar"}  # output layers of the models in checkpoints


def connect(policy: weight_sync.WeightSource, engine: WeightReceiver) -> weight_sync.EngineWeightSync:
    """Return the weight sync of a policy and an engine, and log its transport once. Collective."""
    connection = weight_sync.connect(policy, engine)
    log.info("weight sync: %s", connection.description)
    return connection


def describe(inputs: Inputs, name: str, checkpoint: Path) -> None:
    """Write into a checkpoint of "policy" or "reward_model" which model it is, so that it can be converted alone."""
    megatron_folder.describe(inputs.folder, checkpoint, HEADS[name], getattr(torch, inputs.config.model.dtype))


def save_model(inputs: Inputs, name: str, model: weight_sync.WeightSource, path: Path) -> None:
    """Write "policy" or "reward_model" as a Hugging Face folder, from the first rank. Collective."""
    tensors = weight_sync.full_tensors(model, head=HEADS[name])
    if distributed.rank() == 0:
        dtype = getattr(torch, inputs.config.model.dtype)
        config = architecture.with_head(inputs.folder.config, HEADS[name])
        to_hf.save(path, inputs.folder.path, config, dtype, tensors)
    else:
        for _ in tensors:  # take part in the collectives
            pass
