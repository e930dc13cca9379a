"""What a checkpoint holds of the trained models, and how it is read: weights, optimizers, schedules, random numbers.

A checkpoint is a folder `step_000010` with one Megatron distributed checkpoint for each trained model (`policy`,
`reward_model`), which loads at other layouts too. The sampler's position, the learning rates and the choice of samples
are functions of the step and the seed, so the step restores them. saver.py writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from oreal_megatron.algo import guard
from oreal_megatron.config import ConfigError
from oreal_megatron.mcore import adam
from oreal_megatron.mcore.cpu_shim import device_layer
from oreal_megatron.mcore.scorer import Trainer
from oreal_megatron.runtime import checkpoint_folders, distributed, files, safe_load

# The default sharding of megatron-core 0.16 refuses to load ("flattened_range is not supported").
# Memory-efficient: optimizer states are gathered over gloo on one rank, not on all of them and not on the GPU.
SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
HELD = ("parameters", "optimizer")  # parts of a trainer that a checkpoint holds
log = logging.getLogger(__name__)

COMMON = ("step", "layout", "random", "updates", "past", "optimizer")  # what it holds besides tensors


def load(path: Path, trainers: dict[str, Trainer]) -> int:
    """Restore all trainers in place and return the step to go on with. Collective."""
    with device_layer(), adam.loadable():
        for name, trainer in trainers.items():
            with trainer.parts.here(*HELD):
                state = _load(path / name, trainer)
        if len(state["random"]) == distributed.world_size():
            _restore_random_state(state["random"][distributed.rank()])
    if distributed.rank() == 0 and state["layout"] != layout():
        log.info(
            f"{path.name} was written at {_described(state['layout'])} and is read at {_described(layout())}: sums are "
            "taken in another order, so the run goes on equal up to rounding, not bit by bit"
        )
    return state["step"]


def choose(folder: Path, models: list[str], step: int | None, damaged_too: bool) -> Path | None:
    """The checkpoint to go on from, read and found whole; None where there is none. Collective.

    It is that of `step`, or the newest. A damaged one is named; with `damaged_too` the one before it is taken, else
    the error says which that is.
    """
    found = checkpoint_folders.complete(folder) if step is not None else checkpoint_folders.candidates(folder)
    found = [path for path in found if step in (None, checkpoint_folders.step_of(path))]
    broken = []
    for path in found:
        damage = next(
            filter(
                None,
                distributed.all_gather_object(
                    checkpoint_folders.damage(path, distributed.rank(), distributed.world_size())
                ),
            ),
            None,
        )
        if damage is None:
            break
        broken.append(damage)
    sound = found[len(broken)] if len(broken) < len(found) else None
    if broken and not damaged_too:
        before = (
            f"{sound.name} is sound: --step {checkpoint_folders.step_of(sound)}" if sound else "and no other is sound"
        )
        raise ConfigError(f"{broken[0]}; {before}")
    for damage in broken if distributed.rank() == 0 else ():
        log.warning(f"{damage}; it is passed over")
    for name in models if sound else ():
        check(sound / name)
    return sound


def check(path: Path) -> None:
    """Refuse a folder that is not a Megatron distributed checkpoint, or that would run code when it is loaded."""
    if not path.is_dir():
        raise ConfigError(f"{path.parent} holds no {path.name}: the run that saved it trained none")
    marker = path / "metadata.json"
    if not marker.is_file() or files.read_object(marker).get("sharded_backend") != "torch_dist":
        raise ConfigError(
            f"{path} is not a Megatron distributed checkpoint (torch_dist): its metadata.json says nothing"
        )
    safe_load.check(path)


def layout() -> dict[str, int]:
    """How many ranks share what; equal layouts resume bit by bit."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def _described(cut: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in cut.items() if size > 1) or "one process"


def _load(path: Path, trainer: Trainer) -> dict[str, Any]:
    check(path)
    wanted = sharded(trainer, loading=True)
    _refuse_foreign(path, trainer, wanted)
    state = dist_checkpointing.load(wanted, str(path))
    for key, chunk in _named(trainer).items():
        chunk.load_state_dict(state[key])
    trainer.optimizer.load_state_dict(state["optimizer"])
    adam.separate_steps(trainer.optimizer)
    trainer.updates, trainer.guard_state = state["updates"], guard.GuardState.from_checkpoint(state["past"])
    return state


def _refuse_foreign(path: Path, trainer: Trainer, wanted: dict[str, Any]) -> None:
    """Refuse, on all ranks, a sound checkpoint that is of another model or lacks a part. Collective."""
    held = {key: tensor.global_shape for key, tensor in dist_checkpointing.load_tensors_metadata(str(path)).items()}
    asked = {tensor.key: tensor for tensor in _tensors(wanted)}
    known = set().union(*distributed.all_gather_object(list(asked)))  # by any pipeline stage
    faults = [f"it has no {key}" for key in asked if key not in held]
    faults += [
        f"its {key} has shape {tuple(held[key])}, where {tuple(tensor.global_shape)} is wanted"
        for key, tensor in asked.items()
        if key in held and held[key] != tensor.global_shape and not tensor.allow_shape_mismatch  # a padded vocabulary
    ]
    faults += [f"it has a {key}, which is not wanted" for key in held if key not in known]
    common = dist_checkpointing.load_common_state_dict(str(path))
    faults += [f"it has no {part}" for part in COMMON if part not in common]
    if fault := next(filter(None, distributed.all_gather_object(faults[0] if faults else "")), ""):
        raise ConfigError(
            f"{path} is no checkpoint that {trainer.config.model.path} can go on from: {fault}. Name the model that it "
            "was trained from, or begin a new run"
        )


def _tensors(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    """What is wanted of a checkpoint; a factory stands for several tensors, such as gate and up."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from _tensors(value.build())
        elif isinstance(value, ShardedTensor):
            yield value


def sharded(trainer: Trainer, loading: bool) -> dict[str, Any]:
    """Weights and optimizer state with their places in the whole, as Megatron wants them."""
    models = {name: chunk.sharded_state_dict(metadata=dict(SHARDING)) for name, chunk in _named(trainer).items()}
    optimizer = trainer.optimizer.sharded_state_dict(dict(models), is_loading=loading, metadata=dict(SHARDING))
    return models | {"optimizer": optimizer}


def _named(trainer: Trainer) -> dict[str, Any]:
    """The chunks of this rank's stage under the names that Megatron gives them."""
    if len(trainer.chunks) == 1:
        return {"model": trainer.chunks[0].module}
    return {f"model{number}": chunk.module for number, chunk in enumerate(trainer.chunks)}


def random_state() -> dict[str, Any]:
    """Of this rank."""
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
