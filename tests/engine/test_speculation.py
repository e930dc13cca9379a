"""Real vLLM with drafts: tokens and log-probs are those without, in other batches, and sampled again."""

from __future__ import annotations

import pytest


def story(folder: str, method: str, tensor: int) -> dict:
    import dataclasses

    from oreal_megatron import config as c
    from oreal_megatron.mcore import parallel
    from oreal_megatron.records import Prompt
    from oreal_megatron.rollout import growth
    from oreal_megatron.session.inputs import read_inputs
    from oreal_megatron.session.session import start_engine

    drafts = c.SpeculativeConfig(method, 3, 1, 3, folder if method == "draft_model" else "")
    config = c.Config(
        model=c.ModelConfig(folder),
        engine=c.EngineConfig(
            tensor, 128, 16, 0.05, sleep=False, enforce_eager=True, speculative=drafts, parity_rollouts=100
        ),
        sampling=c.SamplingConfig(rollouts_per_prompt=2, temperature=0.8, top_p=0.9, max_new_tokens=24),
        verify=c.VerifyConfig(workers=1),
    )
    inputs = read_inputs(config)
    parallel.start_process_group()
    engine, verifier = start_engine(inputs)
    verifier.close()
    runner = engine.llm.collective_rpc(lambda worker: worker.model_runner)[0]
    prompts = [Prompt(number, "", "", None, (4 + number, *(5, 6, 7) * 4, 5)) for number in range(6)]

    def tokens(rollouts: list) -> list:
        return [(rollout.key, rollout.tokens, rollout.finished, rollout.logprobs) for rollout in rollouts]

    def everything(sampling: c.SamplingConfig) -> list:
        return tokens([rollout for row in engine.generate(prompts, sampling, (0, 0)) for rollout in row])

    blank = growth.blank_rollouts(prompts, 2)
    greedy = dataclasses.replace(config.sampling, temperature=0.0)
    results = {"drafted": everything(config.sampling), "greedy": everything(greedy)}
    batches = [blank[start : start + 5] for start in range(0, len(blank), 5)]
    results["other batches"] = tokens([r for part in batches for r in engine.extend(part, config.sampling, (0, 0))])
    results["metrics"] = engine.metrics()
    runner.propose_draft_token_ids = lambda *_, **__: [[]] * runner.input_batch.num_reqs
    results["plain"], results["plain greedy"] = everything(config.sampling), everything(greedy)
    results["drafted without drafts"] = engine.metrics()["rollout/drafted_tokens"]
    parallel.stop(engine)
    return results


@pytest.mark.parametrize(
    ("method", "tensor"),
    [
        ("ngram", 1),
        pytest.param("ngram", 2, marks=pytest.mark.full),
        pytest.param("draft_model", 1, marks=pytest.mark.full),
    ],
)
def test_drafts_change_neither_tokens_nor_logprobs(model_folder, in_processes, method, tensor):
    for result in in_processes(tensor, story, str(model_folder), method, tensor):
        assert result["metrics"]["rollout/drafted_tokens"] > 100, "nothing was drafted"
        assert 0 < result["metrics"]["rollout/draft_accepted_share"] < 1
        assert result["greedy"] != result["plain"], "temperature has an effect"
        for name, reference in (("drafted", "plain"), ("other batches", "plain"), ("greedy", "plain greedy")):
            assert len(result[name]) == len(result[reference])
            for (key, tokens, finished, logprobs), (*plain, plain_logprobs) in zip(
                result[name], result[reference], strict=True
            ):
                assert [key, tokens, finished] == plain, name
                assert logprobs == pytest.approx(plain_logprobs, abs=1e-5)
        assert result["drafted without drafts"] == 0
