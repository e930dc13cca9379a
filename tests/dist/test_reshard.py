"""Real Megatron models in gloo processes, handed over to parameter sets of vLLM's layout: bit by bit what the plain
oracle says, under both transports, at every pair of layouts; and planted errors are caught and named.

All pairs: OREAL_EVERY_LAYOUT=1 python -m pytest tests/dist/test_reshard.py
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from pathlib import Path
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

TESTS = Path(__file__).parent.parent
ROWS = json.loads((TESTS / "families.json").read_text())
ROWS = {name: row for name, row in ROWS.items() if not any("experts" in field for field in row)}  # those go by gather
SPEC = importlib.util.spec_from_file_location("reshard_oracle", TESTS / "reshard_oracle.py")
oracle = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(oracle)

# Processes, trainer's (tensor, pipeline, chunks), ranks of a replica of the engine.
FEW = [(2, (1, 2, 2), (2,)), (4, (2, 2, 1), (4,)), (4, (2, 1, 1), (2,))]
EVERY = [
    (1, (1, 1, 1), (1,)), (2, (1, 1, 1), (1, 2)), (4, (1, 1, 1), (1, 2, 4)), (2, (2, 1, 1), (1, 2)),
    (4, (2, 1, 1), (1, 2, 4)), (4, (4, 1, 1), (1, 2, 4)), (2, (1, 2, 1), (1, 2)), (4, (1, 2, 1), (1, 2, 4)),
    (4, (2, 2, 1), (1, 2, 4)), (2, (1, 2, 2), (1, 2)),
]  # fmt: skip
ALL = bool(os.environ.get("OREAL_EVERY_LAYOUT"))
FAMILIES = tuple(ROWS) if ALL else ("Qwen2", "Qwen3", "InternLM2")  # names, biases and orders of their own
BUFFER_BYTES = 64 * 2**10  # many batches; no slice fits at once


class Parameters:
    """An engine's parameters without an engine: of vLLM's shapes, filled by its rules when given full tensors."""

    def __init__(self, arch, ranks: int, rank: int, dtype: torch.dtype):
        from oreal_megatron.reshard import vllm_layout

        self.arch, self.ranks, self.rank, self.awake, self.version = arch, ranks, rank, True, -1
        shapes = vllm_layout.shapes(arch, ranks)
        self.parameters = {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in shapes.items()}
        self.padded = (arch.names.embedding, arch.names.output)

    def live(self):
        return self.parameters, ""

    def load(self, tensors):
        held = oracle.engine(self.arch, dict(tensors), self.ranks, self.rank)
        for name, parameter in self.parameters.items():
            parameter.copy_(held[name])

    def wake(self): ...

    def accept(self, version: int):
        self.version = version

    def equals(self, held) -> bool:
        """Bit by bit; the padding of the vocabulary is nobody's."""
        for name, parameter in self.parameters.items():
            known = ~parameter.isnan()
            if not torch.equal(parameter[known], held[name].to(parameter.dtype)[known]):
                return False
            if not known.all() and name not in self.padded:
                return False
        return True


def start(trainer: tuple[int, int, int], family: str, tied: bool):
    """A policy with weights of its own on every layout, and its architecture; Megatron is started once a process."""
    from oreal_megatron import config as c
    from oreal_megatron.mapping import architecture
    from oreal_megatron.mcore import model

    arch = architecture.read(ROWS[family] | {"tie_word_embeddings": tied, "vocab_size": 203})
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(x.shape, generator=generator) for name, x in oracle.numbered(arch).items()}
    config = c.Config(parallel=c.Parallel(*trainer))
    chunks = model.build(arch, config, "lm")
    model.load(chunks, arch, config, "lm", weights.__getitem__)
    always_here = SimpleNamespace(here=lambda *parts: nullcontext())
    placed = partial(model.placed, chunks, arch, config, "lm")
    policy = SimpleNamespace(config=config, arch=arch, placed=placed, parts=always_here)
    return policy, weights


def transfer(policy, engine, ranks: int, wanted: str):
    """The hand-over of these two; a node is two ranks."""
    import torch.distributed as dist

    from oreal_megatron.cli import build
    from oreal_megatron.reshard.handover import HandOver
    from oreal_megatron.reshard.slices import Layout

    cut, world = policy.config.parallel, dist.get_world_size()
    layout = Layout(policy.arch, cut.tensor, cut.pipeline, cut.virtual, ranks, world, min(world, 2))
    return HandOver(layout, wanted, BUFFER_BYTES, policy.placed, lambda: build.full_tensors(policy), engine)


def every_family(trainer: tuple[int, int, int], engines: tuple[int, ...]) -> dict[str, dict]:
    import torch.distributed as dist

    from oreal_megatron.config import Parallel
    from oreal_megatron.mcore import parallel

    parallel.start_process_group()
    parallel.start_megatron(Parallel(*trainer), seed=0)
    results = {}
    for family, tied, ranks in itertools.product(FAMILIES, (False, True), engines):
        policy, weights = start(trainer, family, tied)
        rank = dist.get_rank() % ranks
        held = oracle.engine(policy.arch, weights, ranks, rank)
        for wanted, dtype in (("direct", torch.float32), ("direct", torch.bfloat16), ("gather", torch.float32)):
            engine = Parameters(policy.arch, ranks, rank, dtype)
            hand_over = transfer(policy, engine, ranks, wanted)
            results[f"{family} tied {tied} engine {ranks} {wanted} {dtype}"] = hand_over(3) | {
                "equal": engine.equals(held), "version": engine.version, "again": hand_over(3)
            }  # fmt: skip
    parallel.stop()
    return results


@pytest.mark.parametrize(("world", "trainer", "engines"), EVERY if ALL else FEW)
def test_the_engine_holds_the_trainers_weights_bit_by_bit(world, trainer, engines, in_processes):
    for results in in_processes(world, every_family, trainer, engines):
        assert len(results) == 2 * 3 * len(FAMILIES) * len(engines)
        for case, metrics in results.items():
            assert metrics["equal"] and metrics["version"] == 3 and metrics["again"] == {}, case
            assert metrics["reshard/direct"] == ("direct" in case) and metrics["reshard/proved_parameters"] > 20, case
            if "gather" in case and world == trainer[0] * trainer[1] == 1:
                assert metrics["reshard/received_bytes"] == 0
            if "direct" in case:
                assert metrics["reshard/received_bytes"] == metrics["reshard/least_received_bytes"], case
                between = metrics["reshard/between_nodes_bytes"]
                assert between == metrics["reshard/least_between_nodes_bytes"], case


def planted() -> dict[str, str]:
    """What the hand-over says when each error happens on rank 1; trainer 2 x 2, two engines of two ranks."""
    import torch.distributed as dist

    from oreal_megatron.config import Parallel
    from oreal_megatron.mcore import parallel
    from oreal_megatron.reshard.handover import WeightsDiffer

    parallel.start_process_group()
    parallel.start_megatron(Parallel(2, 2), seed=0)
    policy, _ = start((2, 2, 1), "Qwen2", False)
    said = {}
    for error, plant in ERRORS.items():
        engine = Parameters(policy.arch, 2, dist.get_rank() % 2, torch.float32)
        hand_over = transfer(policy, engine, 2, "direct")
        hand_over(1)
        if dist.get_rank() == 1:
            plant(hand_over.direct, engine.parameters)
        for _, parameter in policy.placed():  # new weights, so that what is not written is old
            parameter.data.add_(1)
        try:
            hand_over(2)
        except WeightsDiffer as refusal:
            said[error] = str(refusal)
    parallel.stop()
    return said


def swapped_key_and_value(direct, live) -> None:
    """The first received key block of layer 2 is written where a value belongs, and the other way round."""
    qkv = live["model.layers.2.self_attn.qkv_proj.weight"]
    start, _ = qkv.data_ptr(), qkv.nbytes
    place = [
        (parts, number)
        for step in direct.steps
        for parts in [*(message.parts for message in step.receives), step.targets]
        for number, part in enumerate(parts)
        if start <= part.data_ptr() < start + qkv.nbytes
    ]
    (one, i), (other, j) = place[-2:]  # key and value come after the queries, and are of one size
    assert one[i].shape == other[j].shape
    one[i], other[j] = other[j], one[i]


def skipped_layer(direct, live) -> None:
    """Nothing is written to layer 3."""
    name = "model.layers.3."
    spans = [(x.data_ptr(), x.data_ptr() + x.nbytes) for key, x in live.items() if key.startswith(name)]
    for step in direct.steps:
        for parts in [*(message.parts for message in step.receives), step.targets]:
            for number, part in enumerate(parts):
                if any(first <= part.data_ptr() < last for first, last in spans):
                    parts[number] = torch.empty_like(part)


def stale_bucket(direct, live) -> None:
    """One batch arrives but is not written."""
    busy = max(direct.steps, key=lambda step: sum(message.elements for message in step.receives))
    arrive = direct.arrive

    def forgetful(step, receiving, works):
        if step is busy:
            for work in works:
                work.wait()
        else:
            arrive(step, receiving, works)

    direct.arrive = forgetful


def reused_buffer(direct, live) -> None:
    """Every batch is received where the one before it still waits to be written."""
    buffers, waiting, arrive = direct.buffers, [], direct.arrive
    direct.buffers = lambda: [buffers()[0]] * 2

    def late(step, receiving, works):
        for work in works:
            work.wait()
        waiting.append((step, receiving))
        if len(waiting) > 1:
            arrive(*waiting.pop(0), [])
        if step is direct.steps[-1]:
            arrive(*waiting.pop(0), [])

    direct.arrive = late


ERRORS = {error.__name__: error for error in (swapped_key_and_value, skipped_layer, stale_bucket, reused_buffer)}


def test_planted_errors_are_caught_and_named(in_processes):
    everyones = in_processes(4, planted)
    said = everyones[0]
    assert all(other == said for other in everyones), "all ranks stop together"
    assert said.keys() == ERRORS.keys()
    assert all("policy version 2 was handed over by the direct transport" in one for one in said.values())
    assert "model.layers.2.self_attn.qkv_proj.weight of the engine on rank 1 is" in said["swapped_key_and_value"]
    assert "model.layers.3." in said["skipped_layer"]
