"""Megatron distributed checkpoints of all trained models: weights, optimizers, schedules, random-number states.

A checkpoint is a folder `step_000010`, complete before it gets that name, with one distributed checkpoint for each
trained model (`policy`, `reward_model`), which loads at other layouts too. The sampler's position, the learning rates
and the choice of samples are functions of the step and the seed, so the step restores them.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel

from oreal_megatron import ranks
from oreal_megatron.config import ConfigError
from oreal_megatron.mcore import adam
from oreal_megatron.mcore.cpu import device_layer
from oreal_megatron.mcore.worker import Trainer

# The default sharding of megatron-core 0.16 refuses to load ("flattened_range is not supported").
# Memory-efficient: optimizer states are gathered over gloo on one rank, not on all of them and not on the GPU.
SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}

# Megatron warns that ranks hold different states, which is how its memory-efficient sharding works.
logging.getLogger("megatron.core.dist_checkpointing.validation").addFilter(
    lambda record: "('optimizer', 'param_state')" not in record.getMessage()
)


def save(
    folder: Path,
    step: int,
    trainers: dict[str, Trainer],
    keep: int,
    describe: Callable[[str, Path], None] = lambda name, path: None,
) -> Path:
    """Write `folder/step_<step>`, then delete all but the newest `keep`. Collective.

    `describe`, called on the first rank with each model's name and folder, adds what its readers want to know.
    """
    final = folder / f"step_{step:06d}"
    partial = final.with_name(final.name + ".partial")
    if ranks.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    random_states = ranks.gather(_random_state())
    with device_layer():
        for name, trainer in trainers.items():
            if ranks.rank() == 0:
                (partial / name).mkdir()
            dist.barrier()
            common = {"step": step, "updates": trainer.updates, "random": random_states}
            with trainer.parts.here(*trainer.parts), trainer.readable():
                dist_checkpointing.save(common | _sharded(trainer, loading=False), str(partial / name))
    dist.barrier()
    if ranks.rank() == 0:
        for name in trainers:
            describe(name, partial / name)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load(path: Path, trainers: dict[str, Trainer]) -> int:
    """Restore all trainers in place and return the step to go on with. Collective."""
    with device_layer(), adam.loadable():
        for name, trainer in trainers.items():
            with trainer.parts.here(*trainer.parts):
                state = _load(path / name, trainer)
        if len(state["random"]) == ranks.world_size():
            _restore_random_state(state["random"][ranks.rank()])
    return state["step"]


def _load(path: Path, trainer: Trainer) -> dict[str, Any]:
    state = dist_checkpointing.load(_sharded(trainer, loading=True), str(path))
    for key, chunk in _named(trainer).items():
        chunk.load_state_dict(state[key])
    trainer.optimizer.load_state_dict(state["optimizer"])
    adam.separate_steps(trainer.optimizer)
    trainer.updates = state["updates"]
    return state


def newest(folder: Path, models: list[str]) -> Path:
    """The newest finished checkpoint of a run; refuses a folder that lacks one, or a model in it."""
    found = complete(folder)
    if not found:
        raise ConfigError(f"{folder} holds no finished checkpoint to resume from")
    for name in models:
        check(found[-1] / name)
    return found[-1]


def complete(folder: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name))


def check(path: Path) -> None:
    """Refuse a folder that is not a Megatron distributed checkpoint."""
    marker = path / "metadata.json"
    if not marker.is_file() or json.loads(marker.read_text()).get("sharded_backend") != "torch_dist":
        raise ConfigError(
            f"{path} is not a Megatron distributed checkpoint (torch_dist): its metadata.json says nothing"
        )


def _sharded(trainer: Trainer, loading: bool) -> dict[str, Any]:
    metadata = dict(SHARDING)  # Megatron adds the process group to it
    models = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _named(trainer).items()}
    optimizer = trainer.optimizer.sharded_state_dict(dict(models), is_loading=loading, metadata=metadata)
    return models | {"optimizer": optimizer}


def _named(trainer: Trainer) -> dict[str, Any]:
    """The chunks of this rank's stage under the names that Megatron gives them."""
    if len(trainer.chunks) == 1:
        return {"model": trainer.chunks[0].module}
    return {f"model{number}": chunk.module for number, chunk in enumerate(trainer.chunks)}


def _random_state() -> dict[str, Any]:
    with device_layer():
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
        }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])
