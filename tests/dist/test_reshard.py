"""Weight sync of real Megatron models, in gloo processes, to parameter sets of vLLM's layout.

The result equals the plain oracle bit by bit, under both transports, for every pair of layouts. Planted errors are
caught and named by both kinds of checksum.

All pairs and families: python -m pytest --full tests/dist/test_reshard.py
"""

from __future__ import annotations

import itertools
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import reshard_oracle as oracle
import torch

TESTS = Path(__file__).parent.parent
ROWS = json.loads((TESTS / "families.json").read_text())
DENSE = [name for name, row in ROWS.items() if not any("experts" in field for field in row)]  # others go by gather

# Processes, trainer's (tensor, pipeline, chunks), ranks of a replica of the engine.
FEW = [(2, (1, 2, 2), (2,)), (4, (2, 1, 1), (2,))]
EVERY = [
    (1, (1, 1, 1), (1,)), (2, (1, 1, 1), (1, 2)), (4, (1, 1, 1), (1, 2, 4)), (2, (2, 1, 1), (1, 2)),
    (4, (2, 1, 1), (1, 2, 4)), (4, (4, 1, 1), (1, 2, 4)), (2, (1, 2, 1), (1, 2)), (4, (1, 2, 1), (1, 2, 4)),
    (4, (2, 2, 1), (1, 2, 4)), (2, (1, 2, 2), (1, 2)),
]  # fmt: skip
FEW_FAMILIES = ("Qwen2", "Qwen3", "InternLM2")  # names, biases and orders of their own
BUFFER_BYTES = 64 * 2**10  # many batches; no slice fits at once


class Parameters:
    """An engine's parameters without an engine: of vLLM's shapes, filled by its rules when given full tensors."""

    def __init__(self, arch, ranks: int, rank: int, dtype: torch.dtype, refusal: str = ""):
        from oreal_megatron.reshard import vllm_layout

        self.arch, self.ranks, self.rank, self.refusal, self.awake, self.version = arch, ranks, rank, refusal, True, -1
        shapes = vllm_layout.parameter_shapes(arch, ranks)
        self.parameters = {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in shapes.items()}
        self.padded = (arch.names.embedding, arch.names.output)

    def live(self):
        return self.parameters, self.refusal

    def load(self, tensors):
        held = oracle.engine_parameters(self.arch, dict(tensors), self.ranks, self.rank)
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


class Loader:
    """An engine that keeps the full tensors it is given, and whose parameters nobody can read."""

    awake, version = True, -1

    def live(self):
        return {"packed": torch.zeros(1)}, "everything is packed"

    def load(self, tensors):
        self.given = {name: tensor.clone() for name, tensor in tensors}

    def wake(self): ...

    def accept(self, version: int):
        self.version = version


def start(trainer: tuple[int, int, int], family: str, tied: bool):
    """A policy with weights of its own on every layout, and its architecture; Megatron is started once a process."""
    from oreal_megatron import config as c
    from oreal_megatron.mcore import gpt_model, parallel
    from oreal_megatron.models import architecture

    arch = architecture.read(ROWS[family] | {"tie_word_embeddings": tied, "vocab_size": 203})
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(x.shape, generator=generator) for name, x in oracle.numbered(arch).items()}
    config = c.Config(parallel=c.ParallelConfig(*trainer))
    chunks = gpt_model.build(arch, config, "lm")
    gpt_model.load(chunks, arch, config, "lm", weights.__getitem__)
    named_shards = partial(gpt_model.named_shards, chunks, arch, config, "lm")
    policy = SimpleNamespace(config=config, arch=arch, named_shards=named_shards, readable=nullcontext,
                             process_groups=parallel.tensor_and_pipeline_groups)  # fmt: skip
    return policy, weights


def transfer(policy, engine, ranks: int, wanted: str):
    """Return the weight sync of these two; a node is two ranks."""
    import torch.distributed as dist

    from oreal_megatron.reshard.overlaps import ReshardLayout
    from oreal_megatron.reshard.weight_sync import EngineWeightSync, full_tensors

    cut, world = policy.config.parallel, dist.get_world_size()
    layout = ReshardLayout(policy.arch, cut.tensor, cut.pipeline, cut.virtual, ranks, world, min(world, 2))
    full = partial(full_tensors, policy)
    return EngineWeightSync(layout, wanted, BUFFER_BYTES, policy.named_shards, full, engine)


def every_family(trainer: tuple[int, int, int], engines: tuple[int, ...], families: tuple[str, ...]) -> dict[str, dict]:
    import torch.distributed as dist

    from oreal_megatron.config import ParallelConfig
    from oreal_megatron.mcore import parallel

    parallel.start_process_group()
    parallel.start_megatron(ParallelConfig(*trainer), seed=0)
    results = {}
    for family, tied, ranks in itertools.product(families, (False, True), engines):
        policy, weights = start(trainer, family, tied)
        rank = dist.get_rank() % ranks
        held = oracle.engine_parameters(policy.arch, weights, ranks, rank)
        for wanted, dtype in (("direct", torch.float32), ("direct", torch.bfloat16), ("gather", torch.float32)):
            engine = Parameters(policy.arch, ranks, rank, dtype)
            weight_sync = transfer(policy, engine, ranks, wanted)
            results[f"{family} tied {tied} engine {ranks} {wanted} {dtype}"] = weight_sync.sync(3) | {
                "equal": engine.equals(held), "version": engine.version, "again": weight_sync.sync(3)
            }  # fmt: skip
    parallel.stop()
    return results


@pytest.mark.parametrize(
    ("world", "trainer", "engines"), [*FEW, *(pytest.param(*row, marks=pytest.mark.full) for row in EVERY)]
)
def test_the_engine_holds_the_trainers_weights_bit_by_bit(world, trainer, engines, in_processes, full):
    families = tuple(DENSE) if full else FEW_FAMILIES
    for results in in_processes(world, every_family, trainer, engines, families):
        assert len(results) == 2 * 3 * len(families) * len(engines)
        for case, metrics in results.items():
            assert metrics["equal"] and metrics["version"] == 3 and metrics["again"] == {}, case
            assert (
                metrics["weight_sync/direct"] == ("direct" in case) and metrics["weight_sync/verified_parameters"] > 20
            ), case
            if "gather" in case and world == trainer[0] * trainer[1] == 1:
                assert metrics["weight_sync/received_bytes"] == 0
            assert metrics["weight_sync/received_bytes"] >= metrics["weight_sync/least_received_bytes"], case
            if "direct" in case:
                assert metrics["weight_sync/received_bytes"] == metrics["weight_sync/least_received_bytes"], case
                between = metrics["weight_sync/between_nodes_bytes"]
                assert between == metrics["weight_sync/least_between_nodes_bytes"], case


def gathered() -> dict[str, dict]:
    """Bytes that `gather` counts, beside those of the shards, and whether a loader is given the weights."""
    import torch.distributed as dist

    from oreal_megatron.models import tensors
    from oreal_megatron.reshard.byte_counter import ByteCounter
    from oreal_megatron.reshard.weight_sync import full_tensors

    results = {}
    for family in ("Qwen3Moe", "Qwen2"):
        policy, weights = start((2, 2, 1), family, True)
        engine, counted = Loader(), ByteCounter(2)
        metrics = transfer(policy, engine, 1, "direct").sync(3)
        for _ in full_tensors(policy, counted):
            pass
        stages = [sum(4 * entry.shard_shape(2).numel() for entry in tensors.entries(policy.arch, 2, 2, stage, "lm")
                      if entry.exported) for stage in (0, 1)]  # fmt: skip
        own, other = stages if dist.get_rank() < 2 else stages[::-1]
        equal = [torch.equal(engine.given[name], tensor) for name, tensor in weights.items()]
        results[family] = metrics | {"counted": vars(counted), "own": own, "other": other, "given": equal}
    return results


def planted() -> dict[str, str]:
    """Return the message of the weight sync for each error on rank 1."""
    import torch.distributed as dist

    from oreal_megatron.reshard.weight_sync import WeightMismatch

    policy, _ = start((2, 2, 1), "Qwen2", False)
    said = {}
    for error, (transport, readable, plant, _) in ERRORS.items():
        engine = Parameters(policy.arch, 2, dist.get_rank() % 2, torch.float32) if readable else Loader()
        weight_sync = transfer(policy, engine, 2, transport)
        weight_sync.sync(1)
        plant(weight_sync, dist.get_rank() == 1)
        for _, parameter in policy.named_shards():  # new weights, so that what is not written is old
            parameter.data.add_(1)
        try:
            weight_sync.sync(2)
        except WeightMismatch as refusal:
            said[error] = str(refusal)
    return said


def both() -> tuple[dict, dict]:
    """Of a trainer of 2 x 2 ranks on two nodes, its stages."""
    from oreal_megatron.config import ParallelConfig
    from oreal_megatron.mcore import parallel

    parallel.start_process_group()
    parallel.start_megatron(ParallelConfig(2, 2), seed=0)
    results = gathered(), planted()
    parallel.stop()
    return results


@pytest.fixture(scope="module")
def two_by_two(in_processes) -> tuple:
    return tuple(zip(*in_processes(4, both), strict=True))


def test_gather_counts_what_travels_and_proves_what_a_loader_is_given(two_by_two):
    for everyone in two_by_two[0]:
        for family, result in everyone.items():
            own, other = result["own"], result["other"]
            # The own stage's shard to and from one other rank, then whole stages between the nodes.
            assert result["counted"] == {"node_size": 2, "sent": 3 * own, "sent_between": 2 * own,
                                         "received": own + 2 * other, "received_between": 2 * other}  # fmt: skip
            assert result["weight_sync/received_bytes"] == max(own + 2 * other, other + 2 * own)
            assert result["weight_sync/between_nodes_bytes"] == 4 * (own + other)
            assert all(result["given"]) and result["weight_sync/verified_tensors"] == len(result["given"])
            assert not result["weight_sync/verified_parameters"]
            assert ("weight_sync/least_received_bytes" in result) == (family == "Qwen2"), "unknown for mixtures"


def written(direct):
    """Lists of the views of engine parameters that a transfer writes to."""
    for step in direct.batches:
        yield from (message.views for message in step.receives)
        yield step.targets


def within(part, tensors) -> bool:
    return any(x.data_ptr() <= part.data_ptr() < x.data_ptr() + x.nbytes for x in tensors)


def a_key_written_as_a_value(weight_sync, guilty) -> None:
    """The last received key block of layer 2 is written where a value belongs, and the other way round."""
    qkv = weight_sync.engine.parameters["model.layers.2.self_attn.qkv_proj.weight"]
    views = [(parts, i) for parts in written(weight_sync.direct) for i, part in enumerate(parts) if within(part, [qkv])]
    (one, i), (other, j) = views[-2:]  # key and value come after the queries, and are of one size
    if guilty:
        assert one[i].shape == other[j].shape
        one[i], other[j] = other[j], one[i]


def a_layer_not_written(weight_sync, guilty) -> None:
    layer = [x for name, x in weight_sync.engine.parameters.items() if name.startswith("model.layers.3.")]
    for parts in written(weight_sync.direct):
        for number, part in enumerate(parts):
            if guilty and within(part, layer):
                parts[number] = torch.empty_like(part)


def a_bucket_sent_again(weight_sync, guilty) -> None:
    """The largest batch of the version before."""
    busy = max(weight_sync.direct.batches, key=lambda step: sum(message.elements for message in step.sends))
    for message in busy.sends if guilty else ():
        message.views[:] = [part.clone() for part in message.views]


def a_buffer_used_too_early(weight_sync, guilty) -> None:
    """Every batch is received where the one before it still waits to be written."""
    direct = weight_sync.direct
    buffers, waiting, arrive = direct.allocate_buffers, [], direct.finish_batch

    def late(step, receiving, works):
        for work in works:
            work.wait()
        waiting.append((step, receiving))
        if len(waiting) > 1:
            arrive(*waiting.pop(0), [])
        if step is direct.batches[-1]:
            arrive(*waiting.pop(0), [])

    if guilty:
        direct.allocate_buffers, direct.finish_batch = lambda: [buffers()[0]] * 2, late


def gathering(change):
    """An error of `gather`: the loader takes what `change` makes of {name: tensor} of this and the last version."""

    def plant(weight_sync, guilty) -> None:
        from oreal_megatron.reshard.byte_counter import ByteCounter

        full = weight_sync.full_tensors
        last = {name: tensor.clone() for name, tensor in full(ByteCounter(2))}
        if guilty:
            weight_sync.full_tensors = lambda counted: change(dict(full(counted)), last).items()

    return plant


def key_and_value_exchanged(new, last):
    key, value = (f"model.layers.2.self_attn.{x}_proj.weight" for x in "kv")
    return new | {key: new[value], value: new[key]}


def a_layer_left_out(new, last):
    return {name: tensor for name, tensor in new.items() if "layers.3." not in name}


def a_layer_of_the_last_version(new, last):
    return {name: last[name] if "layers.1." in name else tensor for name, tensor in new.items()}


def one_buffer_for_all(new, last):
    """A loader that keeps tensors until it has the whole layer finds the latest in all of them."""
    buffer = torch.empty(max(tensor.numel() for tensor in new.values()))
    return {name: buffer[: tensor.numel()].view(tensor.shape).copy_(tensor) for name, tensor in new.items()}


def a_layer_not_loaded(weight_sync, guilty) -> None:
    """By vLLM's loader, which was given it."""
    layer = [x for name, x in weight_sync.engine.parameters.items() if name.startswith("model.layers.3.")]
    load = weight_sync.engine.load

    def forgetful(tensors):
        before = [x.clone() for x in layer]
        load(tensors)
        torch._foreach_copy_(layer, before)

    if guilty:
        weight_sync.engine.load = forgetful


# Transport, whether the engine's parameters can be read, the error, and what is said.
STALE, OTHER = "it is unchanged since the previous weight sync", "it holds other values"
ENGINE, LOADER = " of the engine on rank ", " given to the loader of the engine on rank 1 differs"
QKV, KEY = (
    "layers.2.self_attn.qkv_proj.weight of the engine on rank 1 differs",
    "layers.2.self_attn.k_proj.weight given to",
)
ERRORS = {
    "swapped, direct": ("direct", True, a_key_written_as_a_value, (QKV, OTHER)),
    "skipped, direct": ("direct", True, a_layer_not_written, ("model.layers.3.", ENGINE, STALE)),  # and relayed
    "stale, direct": ("direct", True, a_bucket_sent_again, ("model.", ENGINE)),
    "reused, direct": ("direct", True, a_buffer_used_too_early, ("model.", ENGINE)),
    "swapped, gather": ("gather", True, gathering(key_and_value_exchanged), (QKV, OTHER)),
    "skipped, gather": ("gather", True, a_layer_not_loaded, ("model.layers.3.", ENGINE + "1 differs", STALE)),
    "stale, gather": (
        "gather",
        True,
        gathering(a_layer_of_the_last_version),
        ("layers.1.", ENGINE + "1 differs", STALE),
    ),
    "reused, gather": ("gather", True, gathering(one_buffer_for_all), ("model.", ENGINE + "1 differs", OTHER)),
    "swapped, packed": ("gather", False, gathering(key_and_value_exchanged), (KEY, LOADER, OTHER)),
    "skipped, packed": ("gather", False, gathering(a_layer_left_out), ("model.layers.3.", LOADER, OTHER)),
    "stale, packed": ("gather", False, gathering(a_layer_of_the_last_version), ("layers.1.", LOADER, STALE)),
}


def test_planted_errors_are_caught_and_named(two_by_two):
    everyones = two_by_two[1]
    said = everyones[0]
    assert all(other == said for other in everyones), "all ranks stop together"
    assert said.keys() == ERRORS.keys()
    for error, (transport, _, _, words) in ERRORS.items():
        assert f"policy version 2 was sent by the {transport} transport" in said[error]
        assert all(word in said[error] for word in words), f"{error}: {said[error]}"
