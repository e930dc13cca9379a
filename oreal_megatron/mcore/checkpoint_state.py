"""Contents of a checkpoint of the models that change, and loading: weights, optimizers, guard history, random numbers.

A checkpoint is a folder `step_000010` with one Megatron distributed checkpoint for each model that changes (`policy`,
`reward_model`, a moving `reference`), which loads at other layouts too. The sampler's position, the learning rates and
the choice of samples are functions of the step and the seed, so the step restores them. checkpoint_saver.py writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from oreal_megatron.config import ConfigError
from oreal_megatron.mcore import megatron_patches
from oreal_megatron.mcore.megatron_patches import cpu_shim
from oreal_megatron.mcore.saved_model import SavedModel
from oreal_megatron.runtime import checkpoint_folders, distributed, files, safe_load

log = logging.getLogger(__name__)

# The default sharding of megatron-core 0.16 refuses to load ("flattened_range is not supported").
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
COMMON_KEYS = ("step", "layout", "random")  # values besides the tensors, beside each model's own


def load(path: Path, models: Mapping[str, SavedModel]) -> int:
    """Restore all models in place and return the step to continue with. Collective."""
    with cpu_shim(), megatron_patches.loadable_torch_adam():
        for name, model in models.items():
            with model.parts.on_device(*model.saved_parts):
                state = _load(path / name, model)
        if len(state["random"]) == distributed.world_size():
            _restore_random_state(state["random"][distributed.rank()])
    if distributed.rank() == 0 and state["layout"] != layout():
        log.info(
            f"{path.name} was written with {_layout_text(state['layout'])} and is read with {_layout_text(layout())}: "
            "sums are computed in another order, so the run continues equal up to rounding, not bit by bit"
        )
    return state["step"]


def choose(folder: Path, models: list[str], step: int | None, skip_damaged: bool) -> Path | None:
    """Return the checkpoint to continue from, verified by its digests; None if there is none. Collective.

    It is the one of `step`, or the newest. Damaged ones are reported; with `skip_damaged` the newest undamaged one is
    used, otherwise the error names it.
    """
    candidates = checkpoint_folders.complete(folder) if step is not None else checkpoint_folders.candidates(folder)
    candidates = [path for path in candidates if step in (None, checkpoint_folders.step_of(path))]
    damages: list[checkpoint_folders.Damage] = []
    for path in candidates:
        damage = checkpoint_folders.damage(path, distributed.rank(), distributed.world_size())
        reports = [report for report in distributed.all_gather_object(damage) if report is not None]
        if not reports:
            break
        damages.append(reports[0])
    undamaged = candidates[len(damages)] if len(damages) < len(candidates) else None
    if damages and not skip_damaged:
        fix = f"resume from {undamaged.name} with --step {checkpoint_folders.step_of(undamaged)}" if undamaged else ""
        raise ConfigError(f"{damages[0]}; {fix or 'there is no undamaged checkpoint'}")
    for damage in damages if distributed.rank() == 0 else ():
        log.warning(f"{damage}; it is skipped")
    if undamaged:
        for name in models:
            check(undamaged / name)
    return undamaged


def check(path: Path) -> None:
    """Raise ConfigError for a folder that is no Megatron distributed checkpoint, or would run code when loaded."""
    if not path.is_dir():
        raise ConfigError(f"{path.parent} contains no {path.name}: the run that saved it did not train one")
    marker = path / "metadata.json"
    if not marker.is_file() or files.read_object(marker).get("sharded_backend") != "torch_dist":
        raise ConfigError(
            f"{path} is not a Megatron distributed checkpoint: its metadata.json does not name the backend torch_dist"
        )
    safe_load.check(path)


def layout() -> dict[str, int]:
    """Return the sizes of the parallel layout; a run resumes bit by bit with an equal one."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def _layout_text(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one process"


def _load(path: Path, model: SavedModel) -> dict[str, Any]:
    check(path)
    template = sharded(model, loading=True)
    _refuse_foreign(path, model, template)
    state = dist_checkpointing.load(template, str(path))
    for key, chunk in _named_chunks(model).items():
        chunk.load_state_dict(state[key])
    model.restore_small_state(state)
    return state


def _refuse_foreign(path: Path, model: SavedModel, template: dict[str, Any]) -> None:
    """Raise ConfigError, on all ranks, for a checkpoint of another model or without a needed part. Collective."""
    stored = {key: tensor.global_shape for key, tensor in dist_checkpointing.load_tensors_metadata(str(path)).items()}
    expected = {tensor.key: tensor for tensor in tensors_of(template)}
    known = set().union(*distributed.all_gather_object(list(expected)))  # by any pipeline stage
    faults = [f"it has no {key}" for key in expected if key not in stored]
    faults += [
        f"its {key} has shape {tuple(stored[key])}, expected {tuple(tensor.global_shape)}"
        for key, tensor in expected.items()
        if key in stored
        and stored[key] != tensor.global_shape
        and not tensor.allow_shape_mismatch  # a padded vocabulary
    ]
    faults += [f"it has an unexpected {key}" for key in stored if key not in known]
    common = dist_checkpointing.load_common_state_dict(str(path))
    needed = (*COMMON_KEYS, *model.small_state(), *(["optimizer"] if model.saved_optimizer else []))
    faults += [f"it has no {part}" for part in needed if part not in common]
    if fault := next(filter(None, distributed.all_gather_object(faults[0] if faults else "")), ""):
        raise ConfigError(
            f"{path} is not a checkpoint of {model.config.model.path}: {fault}. Set model.path to the model it was "
            "trained from, or start a new run"
        )


def tensors_of(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    """Yield the tensors of a checkpoint template; a factory stands for several ones, such as gate and up."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from tensors_of(value.build())
        elif isinstance(value, ShardedTensor):
            yield value


def sharded(model: SavedModel, loading: bool) -> dict[str, Any]:
    """Return weights and optimizer state with their positions in the full tensors, as Megatron expects them."""
    chunks = {name: chunk.sharded_state_dict(metadata=dict(SHARDING)) for name, chunk in _named_chunks(model).items()}
    if model.saved_optimizer is None:
        return chunks
    megatron_patches.use_own_gathering()
    optimizer = model.saved_optimizer.sharded_state_dict(dict(chunks), is_loading=loading, metadata=dict(SHARDING))
    return chunks | {"optimizer": optimizer}


def _named_chunks(model: SavedModel) -> dict[str, GPTModel]:
    """Return the chunks of this rank's stage by Megatron's names."""
    chunks = model.saved_chunks
    return {"model" if len(chunks) == 1 else f"model{number}": chunk for number, chunk in enumerate(chunks)}


def random_state() -> dict[str, Any]:
    """Return the states of this rank's random number generators."""
    with cpu_shim():
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
