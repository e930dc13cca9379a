"""Packed micro-batches through real Megatron: the log-probs of transformers for every family, nothing crosses the
border of a sequence, and no random batch makes the ranks wait for each other."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

SHAPES = {"two stages": dict(pipeline=2), "interleaved": dict(pipeline=2, virtual=2)}


def scores(folders: dict[str, str], many: list[list]) -> dict[str, list[list[torch.Tensor]]]:
    """Log-probs of each sample's response, for each folder and list of samples, each list in one micro-batch."""
    from oreal_megatron import config as c
    from oreal_megatron.algo import packing
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import parallel, trained_models
    from oreal_megatron.models import architecture
    from oreal_megatron.records import Batch

    parallel.start_process_group()
    parallel.start_megatron(c.ParallelConfig(), seed=0)
    parts, found = tuple(packing.micro_batch(samples) for samples in many), {}
    for name, path in folders.items():
        source = HFFolder(path)
        reference = trained_models.Reference(architecture.read(source.config), c.Config(), source.tensor)
        logps = reference.score(Batch(parts, packing.counts(many[0])))
        found[name] = [
            list(logp_T.split(part.action_offsets.diff().tolist())) for logp_T, part in zip(logps, parts, strict=True)
        ]
    parallel.stop()
    return found


def test_packed_log_probs_are_those_of_transformers_and_move_with_no_neighbour(families, in_processes, make_samples):
    from transformers import AutoModelForCausalLM

    samples = make_samples(5, seed=4)
    other = dataclasses.replace(samples[2], prompt_tokens=(9,) * len(samples[2].prompt_tokens))
    found = in_processes(1, scores, families, [samples, [*samples[:2], other, *samples[3:]]])[0]
    assert len(found) == 6
    for name, path in families.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for sample, logp in zip(samples, found[name][0], strict=True):
            ids = torch.tensor([sample.prompt_tokens + sample.response_tokens])
            with torch.no_grad():
                wanted = model(ids).logits[0, len(sample.prompt_tokens) - 1 : -1].log_softmax(-1)
            wanted = wanted.gather(1, torch.tensor(sample.response_tokens)[:, None])[:, 0]
            assert (logp - wanted).abs().max() < 1e-5, name
        same = [torch.equal(one, two) for one, two in zip(*found[name], strict=True)]
        assert same == [number != 2 for number in range(len(samples))], name


def random_response(chance: random.Random, length: int) -> tuple[tuple[int, ...], float, float, tuple[float, ...]]:
    """Return tokens, reward, advantage and log-probs of the engine."""
    return tuple(chance.choices(range(5, 15), k=length)), 1.0, 1.0, tuple(-chance.random() for _ in range(length))


def known_on(rank: int, sample, owner: int):
    """Return a sample as a rank knows it whose response the rank `owner` generated."""
    from oreal_megatron.records import Prompt, Rollout
    from oreal_megatron.runtime import remote_values

    if rank == owner:
        return sample
    prompt = Prompt(0, "", "", None, sample.prompt_tokens)
    rollout = Rollout(prompt, 0, 0, sample.response_tokens, "", True, sample.engine_logprobs)
    remote = remote_values.without_values(rollout, owner)
    return dataclasses.replace(sample, response_tokens=remote.tokens, engine_logprobs=remote.logprobs)


def equal(first, second) -> bool:
    """Return whether two micro-batches have the same tokens and log-probs."""
    return torch.equal(first.tokens, second.tokens) and torch.equal(first.engine_logprobs, second.engine_logprobs)


def random_batches(folder: str, batches: int) -> list[tuple[int, int]]:
    """Train on random batches at both shapes; the micro-batches that this rank ran, and how many of them were empty.

    Each response is on one rank, which sends it to those that train it. Hangs if ranks disagree.
    """
    from megatron.core import parallel_state

    from oreal_megatron import config as c
    from oreal_megatron.algo import packing
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import parallel, trained_models
    from oreal_megatron.models import architecture
    from oreal_megatron.records import Sample
    from oreal_megatron.runtime import distributed, rollout_exchange

    source, generator, chance, ran = HFFolder(folder), random.Random(1), random.Random(2), []
    arch = architecture.read(source.config)
    parallel.start_process_group()
    for shape in SHAPES.values():
        config = c.Config(parallel=c.ParallelConfig(**shape))
        parallel.start_megatron(config.parallel, seed=0)
        policy = trained_models.Policy(arch, config, source.tensor)
        for _ in range(batches):
            lengths = [generator.randint(1, 20) for _ in range(generator.randint(1, 8))]
            samples = [Sample((5,) * 3, *random_response(chance, length)) for length in lengths]
            spec = parallel.packing_spec(generator.randint(4, 50), arch)
            known = [known_on(distributed.rank(), sample, chance.randrange(2)) for sample in samples]
            batch = packing.batch(rollout_exchange.fetch(known, packing.own_numbers(known, spec)), spec)
            assert all(map(equal, batch.micro_batches, packing.batch(samples, spec).micro_batches))
            assert torch.isfinite(torch.tensor(policy.imitate(batch)[1]["policy/gradient_norm"]))
            ran.append((len(batch.micro_batches), sum(not len(part.labels) for part in batch.micro_batches)))
        parallel_state.destroy_model_parallel()
    parallel.start_megatron(c.ParallelConfig(), seed=0)
    parallel.stop()
    return ran


@pytest.mark.parametrize("replicas", [2, *(pytest.param(more, marks=pytest.mark.full) for more in (3, 4))])
def test_no_random_batch_makes_ranks_wait_for_each_other(replicas, families, in_processes, full):
    batches = 40 if full else 10
    ranks = in_processes(2 * replicas, random_batches, families["Qwen2"], batches, timeout_s=600.0)
    numbers = [[number for number, _ in ran] for ran in ranks]
    assert all(theirs == numbers[0] for theirs in numbers) and len(set(numbers[0])) > 1
    assert all(number % 2 == 0 for number in numbers[0][batches:]), "interleaved, in groups of the stages"
    assert len(numbers[0]) == batches * len(SHAPES)
    empty = [sum(counts) for counts in zip(*([empty for _, empty in ran] for ran in ranks), strict=True)]
    assert any(empty[:batches]) and any(empty[batches:]), "ranks with less to do must have met empty micro-batches"


@pytest.fixture(scope="module")
def families(write_model, tmp_path_factory) -> dict[str, str]:
    """Random weights of every family that transformers itself knows; InternLM's come with code of their own."""
    root: Path = tmp_path_factory.mktemp("families")
    return {
        name: write_model(root / name, name) for name in ("Qwen2", "Qwen3", "Llama", "Mistral", "Mixtral", "Qwen3Moe")
    }
