"""Weights on their way out of Megatron: to the engine, into a Hugging Face folder, into a checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from oreal_megatron.convert import megatron_folder, to_hf
from oreal_megatron.models import architecture
from oreal_megatron.protocols import WeightReceiver
from oreal_megatron.reshard import weight_sync
from oreal_megatron.runtime import disk_space, distributed, files, heartbeat
from oreal_megatron.session.inputs import Inputs

log = logging.getLogger(__name__)
HEADS = {"policy": "lm", "reward_model": "scalar", "reference": "lm"}  # output layers of the models in checkpoints
SPARE_BYTES = 8 * 2**20  # of disk, for tokenizer and description beside the tensors


def connect(policy: weight_sync.WeightSource, engine: WeightReceiver) -> weight_sync.EngineWeightSync:
    """Return the weight sync of a policy and an engine, and log its transport once. Collective."""
    connection = weight_sync.connect(policy, engine)
    log.info("weight sync: %s", connection.description)
    return connection


def describe(inputs: Inputs, name: str, checkpoint: Path) -> None:
    """Write into a checkpoint of a model in HEADS which model it is, so that it can be converted alone."""
    megatron_folder.describe(inputs.folder, checkpoint, HEADS[name], getattr(torch, inputs.config.model.dtype))


def save_model(
    inputs: Inputs, name: str, model: weight_sync.WeightSource, path: Path, notes: Mapping[str, str]
) -> None:
    """Write "policy" or "reward_model" as a Hugging Face folder, from the first rank, when there is room. Collective.

    `notes`: text of further files, by name. A disk that others fill meanwhile is waited for, and the write repeated.
    """
    dtype, config = getattr(torch, inputs.config.model.dtype), architecture.with_head(inputs.folder.config, HEADS[name])
    size = to_hf.size(to_hf.layout_of(config, dtype)) + SPARE_BYTES
    while True:
        if distributed.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        disk_space.wait_for_room(path.parent, size, str(path))
        full = False
        tensors = weight_sync.full_tensors(model, head=HEADS[name])
        if distributed.rank() == 0:
            try:
                to_hf.save(path, inputs.folder.path, config, dtype, tensors, notes)
            except OSError as error:
                if not files.is_full(error):
                    raise
                full = True
        for _ in tensors:  # take part in the collectives
            pass
        if not distributed.all_gather_object(full)[0]:
            return
        heartbeat.beat()
        time.sleep(files.RETRY_S)
