"""Rehearsal of one rank of a large world: a real step of the real models, without data.

Recorded are the objects it builds, its calls to other ranks and the memory that autograd holds. Models, optimizers,
packing, Megatron's schedules and the checkpoint's layout are those of a run; fake_world.py lists the differences.
Offloading is left out, because it involves no other ranks.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from oreal_megatron.algo import packing
from oreal_megatron.config import Config
from oreal_megatron.mcore import checkpoint_state, fake_world, parallel, trained_models
from oreal_megatron.mcore.moving_reference import build_reference
from oreal_megatron.mcore.saved_model import SavedModel
from oreal_megatron.models import tensors
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.records import Batch, Sample

MOST_PASSES = 2  # over the mini-batches; a third begins and ends as the second does


class CheckpointShard(NamedTuple):
    """A part of a tensor in a checkpoint."""

    key: str
    shape: tuple[int, ...]  # of the full tensor
    offset: tuple[int, ...]
    size: tuple[int, ...]
    bytes: int
    written: bool  # False: another rank writes the same


@dataclasses.dataclass(frozen=True)
class RankRehearsal:
    """Results of the rehearsal of one rank."""

    rank: int
    groups: list[tuple[int, ...]]  # in the order of their creation
    calls: list[fake_world.Call]
    shapes: dict[str, tuple[int, ...]]  # of the policy's tensors, by their names in the mapping
    shards: list[CheckpointShard]  # of all models that checkpoints contain
    bytes: dict[str, dict[str, int]]  # by model and part
    activation_bytes: dict[str, int]  # peak of the bytes that autograd saves, by model; without parameters
    tokens: tuple[int, ...]  # of each micro-batch
    mini_batches: tuple[int, ...]  # number of micro-batches of each


def rehearse(arch: Architecture, config: Config, world: int, rank: int, samples: Sequence[Sample]) -> RankRehearsal:
    """Act as `rank` for one step on `samples`; without samples, only build the models and plan a checkpoint.

    The policy makes all updates of the step, but goes over its mini-batches at most MOST_PASSES times.
    """
    updates = config.loss.mini_batches * min(config.loss.passes, MOST_PASSES)
    loss = dataclasses.replace(config.loss, updates_per_step=updates)
    config = dataclasses.replace(config, offload=False, loss=loss)
    with fake_world.simulate_rank(world, rank) as recorder:
        parallel.start_megatron(config.parallel, config.seed)
        arguments = (arch, config, _read_without_data(arch))
        models: dict[str, Any] = {"policy": trained_models.Policy(*arguments)}
        if config.reward_model.enabled:
            models["reward_model"] = trained_models.TokenRewardModel(*arguments)
        models["reference"] = build_reference(*arguments, models["policy"])
        saved = [name for name in models if name != "reference" or config.reference.moves]
        sizes = {name: {part: memory.bytes() for part, memory in model.parts.items()} for name, model in models.items()}
        batch, activation_bytes = None, {}
        if samples:
            with torch.device("cpu"):
                spec = parallel.packing_spec(config.tokens_per_micro_batch, arch)
                batch = packing.batch(samples, spec, config.loss.mini_batches)
            activation_bytes = _step(models, config, batch, recorder)
        return RankRehearsal(
            rank,
            recorder.groups,
            recorder.calls,
            {entry.megatron: tuple(tensor.shape) for entry, tensor in models["policy"].named_shards()},
            [shard for name in saved for shard in _shards(name, models[name])],
            sizes,
            activation_bytes,
            tuple(len(part.tokens) for part in batch.micro_batches) if batch else (),
            tuple(len(part.micro_batches) for _, part in batch.split()) if batch else (),
        )


def _read_without_data(arch: Architecture) -> Callable[[str], Tensor]:
    """Return a reader of empty tensors of the right shapes, by name, for the heads of both kinds of model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for head in ("lm", "scalar"):
        for entry in tensors.entries(arch, 1, 1, 0, head):
            shapes |= tensors.hf_shapes(entry, arch)
    return lambda name: torch.empty(shapes[name])


def _step(models: dict[str, Any], config: Config, batch: Batch, recorder: fake_world.CallRecorder) -> dict[str, int]:
    """Run the loop's updates in their order; return the peak bytes that autograd saves, by model."""
    parallel_config = config.parallel
    shares = parallel_config.context * (parallel_config.tensor if parallel_config.sequence else 1)
    hidden = models["policy"].arch.hidden
    shapes = [[len(part.tokens) // shares, 1, hidden] for part in batch.micro_batches]
    activation_bytes = {}

    def run(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        recorder.expect(shapes)
        counter = ActivationCounter(models[name].parts["parameters"].tensors())
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda saved: saved.tensor):
            result = work(*arguments)
        activation_bytes[name] = counter.peak
        return result

    reward_model = models.get("reward_model", trained_models.NoRewardModel(config))
    if "reward_model" in models:
        token_weights, _ = run("reward_model", reward_model.update, batch)
    else:
        token_weights, _ = reward_model.update(batch)
    reference = run("reference", models["reference"].score, batch)
    run("policy", models["policy"].update, batch, reference, token_weights)
    return activation_bytes


class ActivationCounter:
    """Counter of the bytes that autograd saves for the backward pass: each storage once, parameters never."""

    def __init__(self, parameters: Iterable[Tensor]):
        self.parameter_storages = {tensor.untyped_storage()._cdata for tensor in parameters}
        self.uses: Counter[int] = Counter()
        self.current = self.peak = 0

    def pack(self, tensor: Tensor) -> _Saved:
        """Count a tensor that autograd saves; a hook of saved_tensors_hooks."""
        return _Saved(self, tensor)

    def count(self, storage: torch.UntypedStorage, uses: int) -> None:
        """Add (or subtract) uses of a storage."""
        key = storage._cdata
        if key in self.parameter_storages:
            return
        before, self.uses[key] = self.uses[key], self.uses[key] + uses
        self.current += storage.nbytes() * ((self.uses[key] > 0) - (before > 0))
        self.peak = max(self.peak, self.current)


class _Saved:
    """A saved tensor; it is counted until autograd releases this object."""

    def __init__(self, counter: ActivationCounter, tensor: Tensor):
        self.counter, self.tensor = counter, tensor
        counter.count(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.counter.count(self.tensor.untyped_storage(), -1)


def _shards(name: str, model: SavedModel) -> list[CheckpointShard]:
    """Return the parts of a model's checkpoint that this rank holds, weights and optimizer."""
    shards = []
    for value in nested_values(checkpoint_state.sharded(model, loading=False)):
        built = value.build() if isinstance(value, ShardedTensorFactory) else value
        for part in nested_values(built) if isinstance(built, dict | list) else [built]:
            if isinstance(part, ShardedTensor):
                shards.append(_shard(name, part))
    return shards


def _shard(name: str, part: ShardedTensor) -> CheckpointShard:
    size = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    first = not any(part.replica_id) if isinstance(part.replica_id, tuple) else part.replica_id == 0
    bytes_ = part.data.nbytes if part.data is not None else 0
    return CheckpointShard(
        f"{name}/{part.key}", tuple(part.global_shape), tuple(part.global_offset), size, bytes_, first
    )
