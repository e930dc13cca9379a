"""What one rank of a large world would build, say and keep: a real step of the real models, without data.

Models, optimizers, packing, Megatron's schedules and the checkpoint's layout are those of a run; fake_world.py says
what is not. Offloading is left out, it says nothing to other ranks.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from oreal_megatron.algo import packing
from oreal_megatron.config import Config
from oreal_megatron.mcore import checkpoint_state, fake_world, parallel, trained_models
from oreal_megatron.models import tensors
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.records import Batch, Sample


class Shard(NamedTuple):
    """A part of a tensor in a checkpoint."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    size: tuple[int, ...]
    bytes: int
    written: bool  # False: another rank writes the same


@dataclasses.dataclass(frozen=True)
class Rehearsed:
    """One rank's part."""

    rank: int
    groups: list[tuple[int, ...]]  # in the order in which they were asked for
    calls: list[fake_world.Call]
    shapes: dict[str, tuple[int, ...]]  # of the policy's tensors, by their names in the mapping
    shards: list[Shard]  # of all trained models
    bytes: dict[str, dict[str, int]]  # by model and part
    kept: dict[str, int]  # most bytes that autograd kept for the backward, by model; parameters left out
    tokens: tuple[int, ...]  # of each micro-batch


def rehearse(arch: Architecture, config: Config, world: int, rank: int, samples: Sequence[Sample]) -> Rehearsed:
    """Be `rank` for one step on `samples`; without samples, only build and lay out the checkpoint."""
    config = dataclasses.replace(config, offload=False)
    with fake_world.rank_of(world, rank) as record:
        parallel.start_megatron(config.parallel, config.seed)
        pieces = (arch, config, _without_data(arch))
        models: dict[str, Any] = {"policy": trained_models.Policy(*pieces)}
        if config.reward_model.enabled:
            models["reward_model"] = trained_models.TokenRewardModel(*pieces)
        trainers = dict(models)
        models["reference"] = trained_models.Reference(*pieces)
        sizes = {name: {part: held.bytes() for part, held in one.parts.items()} for name, one in models.items()}
        batch, kept = None, {}
        if samples:
            with torch.device("cpu"):
                batch = packing.batch(samples, parallel.packing_spec(config.tokens_per_micro_batch, arch))
            kept = _step(models, config, batch, record)
        return Rehearsed(
            rank,
            record.groups,
            record.calls,
            {entry.megatron: tuple(tensor.shape) for entry, tensor in models["policy"].named_shards()},
            [shard for name, trainer in trainers.items() for shard in _shards(name, trainer)],
            sizes,
            kept,
            tuple(len(part.tokens) for part in batch.micro_batches) if batch else (),
        )


def _without_data(arch: Architecture) -> Callable[[str], Tensor]:
    """Reads tensors of the right shapes, by name, with the head of either kind of model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for head in ("lm", "scalar"):
        for entry in tensors.entries(arch, 1, 1, 0, head):
            shapes |= tensors.hf_shapes(entry, arch)
    return lambda name: torch.empty(shapes[name])


def _step(models: dict[str, Any], config: Config, batch: Batch, record: fake_world.Record) -> dict[str, int]:
    """The loop's updates in their order."""
    cut = config.parallel
    shares = cut.context * (cut.tensor if cut.sequence else 1)
    hidden = models["policy"].arch.hidden
    shapes = [[len(part.tokens) // shares, 1, hidden] for part in batch.micro_batches]
    kept = {}

    def run(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        record.expect(shapes)
        watch = Kept(models[name].parts["parameters"].find())
        with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda saved: saved.tensor):
            result = work(*arguments)
        kept[name] = watch.most
        return result

    reward_model = models.get("reward_model", trained_models.NoRewardModel())
    if "reward_model" in models:
        token_weights, _ = run("reward_model", reward_model.update, batch)
    else:
        token_weights, _ = reward_model.update(batch)
    reference = run("reference", models["reference"].score, batch)
    run("policy", models["policy"].update, batch, reference, token_weights)
    return kept


class Kept:
    """Counts the bytes that autograd keeps for the backward: each storage once, `own` ones never."""

    def __init__(self, own: Sequence[Tensor]):
        self.own = {tensor.untyped_storage()._cdata for tensor in own}
        self.uses: Counter[int] = Counter()
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> _Saved:
        return _Saved(self, tensor)

    def count(self, storage: torch.UntypedStorage, uses: int) -> None:
        key = storage._cdata
        if key in self.own:
            return
        before, self.uses[key] = self.uses[key], self.uses[key] + uses
        self.now += storage.nbytes() * ((self.uses[key] > 0) - (before > 0))
        self.most = max(self.most, self.now)


class _Saved:
    """A tensor that autograd keeps, until autograd lets go of this."""

    def __init__(self, watch: Kept, tensor: Tensor):
        self.watch, self.tensor = watch, tensor
        watch.count(tensor.untyped_storage(), 1)

    def __del__(self):
        self.watch.count(self.tensor.untyped_storage(), -1)


def _shards(name: str, trainer: Any) -> list[Shard]:
    """The parts of a model's checkpoint that this rank has, weights and optimizer."""
    found = []
    for value in nested_values(checkpoint_state.sharded(trainer, loading=False)):
        built = value.build() if isinstance(value, ShardedTensorFactory) else value
        for part in nested_values(built) if isinstance(built, dict | list) else [built]:
            if isinstance(part, ShardedTensor):
                found.append(_shard(name, part))
    return found


def _shard(name: str, part: ShardedTensor) -> Shard:
    size = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    first = not any(part.replica_id) if isinstance(part.replica_id, tuple) else part.replica_id == 0
    bytes_ = part.data.nbytes if part.data is not None else 0
    return Shard(f"{name}/{part.key}", tuple(part.global_shape), tuple(part.global_offset), size, bytes_, first)
