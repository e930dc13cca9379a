"""A weight sync names the parameter that it did not write, also where tensors have moved since the one before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reshard_oracle as oracle
import torch

from oreal_megatron.models import architecture, tensors
from oreal_megatron.reshard.direct_transport import DirectTransfer
from oreal_megatron.reshard.overlaps import ReshardLayout
from oreal_megatron.reshard.weight_sync import EngineWeightSync, WeightMismatch

ROW = json.loads((Path(__file__).parent.parent / "families.json").read_text())["Qwen2"]
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "intermediate_size": 48}
ARCH = architecture.read(ROW | SIZES | {"num_hidden_layers": 2, "vocab_size": 64})
FORGOTTEN = "model.layers.1.mlp.down_proj.weight"


class World:
    """One process with the trainer's shards and an engine's parameters; either side can move in memory."""

    def __init__(self):
        weights = {name: torch.randn(tensor.shape) for name, tensor in oracle.numbered(ARCH).items()}
        self.trainer = oracle.trainer_tensors(ARCH, weights, 1, 0, 1, [0])
        self.engine = {name: torch.zeros_like(x) for name, x in oracle.engine_parameters(ARCH, weights, 1, 0).items()}
        layout = ReshardLayout(ARCH, 1, 1, 1, 1, 1, 1)
        self.sync = EngineWeightSync(layout, "direct", 2**20, self.named_shards, lambda counter: iter(()), self)

    def named_shards(self):
        return [(entry, self.trainer[entry.megatron]) for entry in tensors.entries(ARCH, 1, 1, 0, "lm")]

    def live(self):
        return self.engine, ""

    def move(self, side: str) -> None:
        setattr(self, side, {name: tensor.clone() for name, tensor in getattr(self, side).items()})

    def update(self) -> None:
        for tensor in self.trainer.values():
            tensor.add_(1)


@pytest.mark.parametrize("moved", [(), ("trainer",), ("engine",), ("trainer", "engine")], ids="+".join)
@pytest.mark.parametrize("changed", [False, True])
def test_a_parameter_that_is_not_written_is_unchanged_since_the_previous_sync(moved, changed, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)  # one rank
    world, run = World(), DirectTransfer.run
    world.sync.send(1)

    def forgetful(transfer, counter):
        before = world.engine[FORGOTTEN].clone()
        run(transfer, counter)
        world.engine[FORGOTTEN].copy_(before + 2 * changed)  # the update adds 1

    monkeypatch.setattr(DirectTransfer, "run", forgetful)
    world.update()
    for side in moved:
        world.move(side)
    state = "it holds other values" if changed else "it is unchanged since the previous weight sync"
    with pytest.raises(WeightMismatch, match=f"the checksum of {FORGOTTEN} of the engine on rank 0 .*: {state}"):
        world.sync.send(2)
