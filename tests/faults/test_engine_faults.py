"""Real vLLM engines that fail on one rank: asked again they answer what they would have answered, or all ranks stop."""

from __future__ import annotations

import pytest


class Faulty:
    """vLLM's engine, which lets some results of a step go wrong. Faults are used up from the front."""

    def __init__(self, engine, faults: list[str]):
        self.engine, self.faults = engine, faults

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def step(self) -> list:
        outputs = self.engine.step()
        fault = self.faults.pop(0) if outputs and self.faults else ""
        if fault == "raise":
            raise RuntimeError("the scheduler lost a block\nand more lines")
        if fault == "gpu":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more lines")
        if fault == "fewer":
            return outputs[1:]
        if fault == "empty":  # the last: one whose log-probs nobody asked for, and misses
            outputs[-1].outputs[0].token_ids = []
        if fault == "aborted":
            answer = outputs[-1].outputs[0]
            answer.token_ids, answer.finish_reason = answer.token_ids[:1], "abort"
        return outputs


def answers(folder: str, tensor: int, plans: list[dict[int, list[str]]]) -> list:
    """What a generation gives, and how many answers were announced here, under each plan of faults by rank."""
    from oreal_megatron import config as c
    from oreal_megatron.mcore import parallel
    from oreal_megatron.records import Prompt
    from oreal_megatron.runtime import distributed, rollout_exchange
    from oreal_megatron.session.inputs import read_inputs
    from oreal_megatron.session.session import start_engine

    config = c.Config(
        model=c.ModelConfig(folder),
        engine=c.EngineConfig(tensor=tensor, max_model_len=64, max_num_seqs=4, kv_cache_gib=0.05, enforce_eager=True),
        sampling=c.SamplingConfig(rollouts_per_prompt=2, max_new_tokens=8),
        verify=c.VerifyConfig(workers=1),
    )
    parallel.start_process_group()
    engine, verifier = start_engine(read_inputs(config))
    vllm = engine.llm.llm_engine
    prompts = [Prompt(i, "", "", None, (4 + i, 5, 6)) for i in range(5)]
    results = []
    for plan in plans:
        faults, announced = list(plan.get(distributed.rank(), [])), []
        engine.llm.llm_engine, engine.stop_requested = Faulty(vllm, faults), lambda faults=faults: "leave" in faults
        try:
            rows = engine.generate(prompts, config.sampling, (0, 7), announced.append)
            gathered = rollout_exchange.gather([rollout for row in rows for rollout in row])
            first = distributed.all_gather_object([rollout.tokens for rollout in gathered])[0]
            results.append((first, [one.key for one in announced]))
        except c.RunStopped as error:
            results.append(str(error))
    engine.llm.llm_engine = vllm
    verifier.grader.close()
    engine.close()
    return results


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.full)])
def test_what_an_engine_failed_to_answer_is_asked_again(tensor, model_folder, in_processes):
    both = {rank: ["raise"] for rank in (0, 1)}  # of one replica: one that fails alone leaves the other in vLLM
    alone = {1: ["raise"]} if tensor == 1 else both
    plans = [{}, alone, {1: ["fewer"]}, {0: ["empty"]}, {1: ["aborted"], 0: ["fewer"]}, {1: ["fewer"] * 99}, {}]
    plans += [{rank: ["raise"] * 99 for rank in alone}, {}, {rank: ["gpu"] for rank in alone}, {1: ["leave"]}]
    first, second = in_processes(2, answers, str(model_folder), tensor, plans)
    undisturbed, keys = first[0][0], sorted(first[0][1] + second[0][1])
    assert len(keys) == len(set(keys)) == 10
    for number in (1, 2, 3, 4, 6, 8):
        assert first[number][0] == second[number][0] == undisturbed, plans[number]
        assert sorted(first[number][1] + second[number][1]) == keys, "each answer is announced once"
    assert first[5] == second[5] and first[5].startswith(
        "step 7: the engine did not complete all responses after 1 retries"
    )
    assert "rank 1 is missing" in first[5] and "rank 0" not in first[5]
    assert first[7] == second[7]
    assert "responses (RuntimeError: the scheduler lost a block)" in first[7]
    assert first[9] == second[9] and "after 0 retries" in first[9], "such an error stays, so nothing is repeated"
    assert "(RuntimeError: CUDA error: an illegal memory access was encountered); an error of a GPU stays" in first[9]
    assert first[10] == second[10] == "a stop was requested during generation", "one was asked, all leave"
