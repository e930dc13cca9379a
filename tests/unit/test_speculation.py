"""Drafts change no token: ExactSampler against vLLM's plain sampler, position after position."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from oreal_megatron import config as c
from oreal_megatron.config import ConfigError
from oreal_megatron.rollout import speculation

VOCABULARY = 5


def metadata(seeds: list[int], temperature: float, top_p: float) -> SamplingMetadata:
    requests = len(seeds)
    return SamplingMetadata(
        temperature=torch.full((requests,), temperature) if temperature else None,
        all_greedy=not temperature,
        all_random=bool(temperature),
        top_p=torch.full((requests,), top_p) if top_p < 1 else None,
        top_k=None,
        generators={number: torch.Generator().manual_seed(seed) for number, seed in enumerate(seeds)},
        max_num_logprobs=0,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.zeros(requests),
        presence_penalties=torch.zeros(requests),
        repetition_penalties=torch.ones(requests),
        output_token_ids=[[] for _ in seeds],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


drafts_of_requests = st.lists(
    st.lists(st.integers(0, VOCABULARY - 1), max_size=4), min_size=1, max_size=4
).filter(any)  # fmt: skip


@settings(max_examples=60)
@given(drafts_of_requests, st.sampled_from([(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)]), st.integers(0, 2**31 - 1))
def test_tokens_logprobs_and_random_numbers_are_those_of_plain_sampling(drafts, sampling, seed):
    """The oracle draws one token after the other, and stops behind the first that is not the draft."""
    seeds = [seed % 1000 + number for number in range(len(drafts))]
    random = torch.Generator().manual_seed(seed)
    logits = [torch.randn(len(draft) + 1, VOCABULARY, generator=random) for draft in drafts]
    sampler, batch = speculation.ExactSampler(Sampler()), metadata(seeds, *sampling)
    output = sampler(SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu")), None, torch.cat(logits), batch)

    width, accepted = output.sampled_token_ids.shape[1], 0
    logprobs = output.logprobs_tensors.logprobs.reshape(len(drafts), width, -1)
    for number, draft in enumerate(drafts):
        alone = metadata([seeds[number]], *sampling)
        expected = []
        for depth in range(len(draft) + 1):
            plain = Sampler()(logits[number][depth : depth + 1].clone(), alone)
            expected.append(int(plain.sampled_token_ids))
            assert logprobs[number, depth, 0] == plain.logprobs_tensors.logprobs[0, 0]
            if depth == len(draft) or expected[-1] != draft[depth]:
                break
            accepted += 1
        padding = [speculation.NO_TOKEN] * (width - len(expected))
        assert output.sampled_token_ids[number].tolist() == expected + padding
        assert torch.equal(batch.generators[number].get_state(), alone.generators[0].get_state())
    assert sampler.take_counts() == (sum(map(len, drafts)), accepted) and sampler.take_counts() == (0, 0)


def test_a_draft_is_accepted_as_often_as_the_policy_samples_it():
    """The distribution over all seeds, of the accepted draft and of what replaces it, is the policy's."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    requests = 4000
    drafts = [[2]] * requests
    batch = metadata(list(range(requests)), 1.0, 1.0)
    sampler = speculation.ExactSampler(Sampler())
    rows = logits.repeat(2 * requests, 1)
    output = sampler(SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu")), None, rows, batch)
    shares = torch.bincount(output.sampled_token_ids[:, 0], minlength=VOCABULARY) / requests
    probabilities = logits[0].softmax(0)
    error = (probabilities * (1 - probabilities) / requests).sqrt()
    assert ((shares - probabilities).abs() < 5 * error).all(), (shares, probabilities)
    drafted, accepted = sampler.take_counts()
    assert accepted == int((output.sampled_token_ids[:, 0] == 2).sum()) and drafted == requests


@pytest.mark.parametrize(
    ("settings_of", "says"),
    [
        ({"method": "draft_model"}, "needs a model"),
        ({"method": "ngram", "model": "folder"}, "which has none"),
        ({"model": "folder"}, "which has none"),
        ({"method": "ngram", "ngram_min": 5, "ngram_max": 4}, "no n-gram has such a length"),
        ({"method": "eagle", "model": "folder"}, "set engine.sleep=false"),
        ({"method": "ngram", "tokens": 0}, "expected 1 to 64"),
        ({"method": "medusa"}, "expected one of"),
    ],
)
def test_refused_settings(settings_of, says):
    config = c.Config(engine=c.EngineConfig(speculative=c.SpeculativeConfig(**settings_of)))
    assert says in " ".join(c.problems(config))


def test_combinations_that_vllm_refuses_later_are_refused_at_once():
    config = c.Config(engine=c.EngineConfig(speculative=c.SpeculativeConfig("ngram")))
    assert not [text for text in c.problems(config) if "specul" in text]
    with_min_p = dataclasses.replace(config, sampling=c.SamplingConfig(min_p=0.1))
    assert "takes no min_p" in " ".join(c.problems(with_min_p))
    passed_on = c.Config(engine=c.EngineConfig(vllm={"speculative_config": {"method": "ngram"}}))
    assert "set engine.speculative.method instead" in " ".join(c.problems(passed_on))


def test_suffix_trees_need_their_package(monkeypatch):
    monkeypatch.setattr(speculation, "has_arctic_inference", lambda: False)
    with pytest.raises(ConfigError, match="arctic-inference; it is not installed"):
        speculation.prepare(c.SpeculativeConfig("suffix"))


@pytest.mark.parametrize("method", ["ngram", "suffix", "draft_model", "eagle", "eagle3"])
def test_every_argument_is_a_field_of_vllm(method):
    from typing import get_args

    from vllm.config.speculative import SpeculativeConfig, SpeculativeMethod

    arguments = c.SpeculativeConfig(method, model="folder").arguments()
    assert arguments.keys() <= {field.name for field in dataclasses.fields(SpeculativeConfig)}
    methods = {name for choice in get_args(SpeculativeMethod) for name in (get_args(choice) or [choice])}
    assert method in methods
