"""Real Megatron and real vLLM in the same processes: after an update they are the same policy, and when they are not,
the proof says so."""

from __future__ import annotations

import pytest

LONG_PROMPT = 200  # tokens; longer than vLLM's cache block (128 on CPU), so that prefixes are cached


def story(folder: str, engine_tensor: int, tensor: int, pipeline: int, samples: list) -> dict:
    """Generate, update, hand over, generate again; then three ways in which the engine goes wrong."""
    from oreal_megatron import config as c
    from oreal_megatron.cli import build
    from oreal_megatron.mcore import parallel, roles
    from oreal_megatron.records import Prompt

    config = c.Config(
        model=c.Model(folder),
        parallel=c.Parallel(tensor, pipeline),
        engine=c.Engine(tensor=engine_tensor, max_model_len=256, max_num_seqs=16, kv_cache_gb=0.1, enforce_eager=True),
        sampling=c.Sampling(answers_per_prompt=2, temperature=1.2, top_p=0.9, max_new_tokens=12),
        optimizer=c.Optimizer(lr=0.02, warmup_steps=0),
        verify=c.Verify(workers=1),
    )
    inputs = build.prepare(config)
    parallel.start_process_group()
    engine, _ = build.start_engine(inputs)
    parallel.start_megatron(config.parallel, seed=0)
    policy = roles.Policy(inputs.arch, config, inputs.folder.tensor)
    prompts = [Prompt(i, "", "", None, tuple(4 + (7 * i + j) % 70 for j in range(LONG_PROMPT))) for i in range(4)]
    table = Story(config, policy, engine, prompts, samples)

    result = {"before": table.gap(0), "first": table.tokens(0), "again": table.tokens(0), "other": table.tokens(1)}
    table.update()
    result["missed"] = table.gap(0)
    engine.version = policy.updates
    result["stale"] = table.gap(0)
    build.hand_over(policy, engine)
    result["after"] = table.gap(0)
    result["version"] = engine.version
    result["swapped"] = table.gap_with_a_query_head_swapped_for_a_key()
    result["refused"] = table.reset_refused_while_a_request_runs()
    parallel.stop(engine)
    return result


class Story:
    def __init__(self, config, policy, engine, prompts, samples):
        self.config, self.policy, self.engine, self.prompts, self.samples = config, policy, engine, prompts, samples

    def gap(self, step: int) -> str | float:
        """Mean log-prob difference of the proof in the loop, or its refusal."""
        from oreal_megatron.algo.proof import PoliciesDiffer
        from oreal_megatron.loop import same_policy
        from oreal_megatron.mcore import parallel

        rollouts = self.engine.generate(self.prompts, self.config.sampling, (0, step))
        try:
            cut = (4096, *parallel.data_parallel())
            return same_policy(self.config, self.engine, self.policy, rollouts, cut, step)["proof/logprob_gap"]
        except PoliciesDiffer as refusal:
            return str(refusal)

    def tokens(self, step: int) -> list:
        rollouts = self.engine.generate(self.prompts, self.config.sampling, (0, step))
        return [rollout.tokens for row in rollouts for rollout in row]

    def update(self) -> None:
        from oreal_megatron.algo import pack
        from oreal_megatron.mcore import parallel

        self.policy.imitate(pack.batch(self.samples, 4096, *parallel.data_parallel()))

    def gap_with_a_query_head_swapped_for_a_key(self) -> str | float:
        from oreal_megatron.cli import build

        weights = {name: tensor.clone() for name, tensor in build.full_tensors(self.policy)}
        query, key = (weights[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qk")
        head = self.policy.arch.head_dim
        query[:head], key[:head] = key[:head].clone(), query[:head].clone()
        self.engine.load(weights.items(), self.policy.updates)
        return self.gap(0)

    def reset_refused_while_a_request_runs(self) -> str:
        from oreal_megatron.cli import build
        from oreal_megatron.rollout.engine import EngineError

        core = self.engine.llm.llm_engine
        parameters = self.engine._parameters(self.config.sampling, (0, 0), 0, 0)
        core.add_request("left over", {"prompt_token_ids": list(self.prompts[0].tokens)}, parameters)
        core.step()
        try:
            build.hand_over(self.policy, self.engine)
        except EngineError as refusal:
            return str(refusal)
        return ""


@pytest.mark.parametrize(
    ("folder", "layout"),
    [("model_folder", (2, 2, 1)), ("tied_model_folder", (1, 1, 2))],
    ids=["tensor 2, engine 2", "tied, pipeline 2, two engines"],
)
def test_engine_and_trainer_are_the_same_policy(folder, layout, in_processes, make_samples, request):
    ranks = in_processes(2, story, str(request.getfixturevalue(folder)), *layout, make_samples(8, seed=4))
    for result in ranks:
        assert result["before"] < 1e-5 and result["after"] < 1e-4, result  # a step this large makes large logits
        assert "version 0, the trainer is at 1" in result["missed"]
        assert "differ by" in result["stale"] and "differ by" in result["swapped"]
        assert "refused to reset its prefix cache" in result["refused"]
        assert result["version"] == 1
        assert result["first"] == result["again"] != result["other"], "answers are a function of seed and step"
    assert ranks[0]["first"] == ranks[1]["first"], "all ranks know all rollouts"
