"""Weights that are gathered under the next forward: the same training bit by bit, and readers see the new ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

# parallel.overlap, offload
CASES = {"plain": (False, False), "overlapping": (True, False), "overlapping, offloaded": (True, True)}


def every_case(folder: str, samples: list, scratch: str) -> dict:
    from megatron.core import parallel_state

    from oreal_megatron.config import ParallelConfig
    from oreal_megatron.mcore import parallel

    parallel.start_process_group()
    results = {}
    for name, (overlap, offload) in CASES.items():
        parallel.start_megatron(ParallelConfig(overlap=overlap), seed=0)
        results[name] = story(folder, samples, overlap, offload, Path(scratch) / name)
        parallel_state.destroy_model_parallel()
    parallel.start_megatron(ParallelConfig(), seed=0)
    parallel.stop()
    return results


def story(folder: str, samples: list, overlap: bool, offload: bool, scratch: Path) -> dict[str, list]:
    """What each reader finds after each of three updates."""
    from oreal_megatron import config as c
    from oreal_megatron.algo import packing
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import checkpoint_state, parallel, trained_models
    from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver
    from oreal_megatron.models import architecture
    from oreal_megatron.reshard.weight_sync import full_tensors

    config = c.Config(
        model=c.ModelConfig(folder),
        parallel=c.ParallelConfig(overlap=overlap),
        optimizer=c.OptimizerConfig(lr=1e-2, warmup_steps=0),
        offload=offload,
    )
    source = HFFolder(folder)
    pieces = (architecture.read(source.config), config, source.tensor)
    policy, found = trained_models.Policy(*pieces), {"update": [], "score": [], "weight sync": [], "checkpoint": []}
    for step, reader in enumerate(("score", "weight sync", "checkpoint")):  # each is the first to read an update
        batch = packing.batch(samples[step:], parallel.packing_spec(40))
        _, metrics = policy.imitate(batch)
        metrics.pop("policy/largest_weight")  # before gathering, old weights of other replicas count as well
        found["update"].append(metrics)
        for name in (reader, "score", "weight sync"):
            if name == "score":
                found[name] += policy.score(batch)
            elif name == "weight sync":
                found[name] += [value.clone() for _, value in full_tensors(policy)]
            else:
                saved = CheckpointSaver(scratch, {"policy": policy}, keep=1).save(step)
                fresh = trained_models.Policy(*pieces)
                checkpoint_state.load(saved, {"policy": fresh})
                found[name] += [value.clone() for _, value in full_tensors(fresh)]
    return found


@pytest.fixture(scope="module")
def ranks(model_folder, in_processes, tmp_path_factory) -> list[dict]:
    from oreal_megatron.records import Sample

    samples = [Sample((5, 6), tuple(range(7, 9 + place)), 1.0, 1.0) for place in range(12)]
    return in_processes(2, every_case, str(model_folder), samples, str(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("reader", ["update", "score", "weight sync", "checkpoint"])
@pytest.mark.parametrize("case", [name for name in CASES if name != "plain"])
def test_every_reader_finds_the_new_weights(case, reader, ranks):
    for rank in ranks:
        wanted, got = rank["plain"][reader], rank[case][reader]
        assert len(wanted) == len(got) > 0
        if reader == "update":
            assert wanted == got
        else:
            assert all(torch.equal(one, two) for one, two in zip(wanted, got, strict=True))
