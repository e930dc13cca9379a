"""Token weights of real Megatron models: a head of zeros, the control that permutes them, rules, the policy's rate."""

from __future__ import annotations

import pytest
import torch

RULE = """
def wrong_steps(score_T, micro_batch, config):
    incorrect_T = (micro_batch.reward < 0).repeat_interleave(micro_batch.action_offsets.diff())
    return 1.0 - incorrect_T.float() * (micro_batch.labels % 2 == 0)
"""
LAYOUTS = {"replicas": {}, "stages": dict(pipeline=2), "ranks": dict(tensor=2)}
ONLY = {"stages": ("zeros", "ruled, no reward model"), "ranks": ("shuffled",)}  # the others are the same code
VARIANTS = {
    "zeros": {},
    "normal": dict(head_init="normal"),
    "shuffled": dict(head_init="normal", shuffle=True),
    "ruled": dict(head_init="normal", rule=True),
    "ruled, no reward model": dict(rule=True, enabled=False),
}


def every_case(folder: str, samples: list, rules: str) -> dict:
    from megatron.core import parallel_state

    from oreal_megatron.config import ParallelConfig
    from oreal_megatron.mcore import parallel

    parallel.start_process_group()
    results = {}
    for layout, degrees in LAYOUTS.items():
        parallel.start_megatron(ParallelConfig(**degrees), seed=0)
        for name in ONLY.get(layout, VARIANTS):
            results[layout, name] = two_steps(folder, samples, degrees, rules, **VARIANTS[name])
        parallel_state.destroy_model_parallel()
    parallel.start_megatron(ParallelConfig(), seed=0)
    parallel.stop()
    return results


def two_steps(
    folder: str, samples: list, degrees: dict, rules: str, *, shuffle=False, rule=False, enabled=True, head_init="zeros"
) -> dict:
    """Weights of two steps with the sides and labels of their tokens, metrics, and which gradients were 0 at first."""
    from oreal_megatron import config as c
    from oreal_megatron.algo import packing
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import gpt_model, parallel, trained_models
    from oreal_megatron.models import architecture

    optimizer = c.OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=3)
    config = c.Config(
        steps=9,
        policy_freeze_steps=3,
        parallel=c.ParallelConfig(**degrees),
        weights=c.WeightsConfig(shuffle=shuffle, rule=rules if rule else "", threshold_incorrect=0.0),
        reward_model=c.RewardModelConfig(enabled=enabled, head_init=head_init, optimizer=optimizer),
        optimizer=optimizer,
    )
    source = HFFolder(folder)
    pieces = (architecture.read(source.config), config, source.tensor)
    model = trained_models.TokenRewardModel(*pieces) if enabled else trained_models.NoRewardModel(config)
    batch = packing.batch(samples, parallel.packing_spec(40))
    weights, metrics = model.update(batch)
    result = {"first": weights.values, "metrics": metrics, "count": len(batch.micro_batches)}
    if enabled:
        shards = [
            (entry.megatron, live)
            for chunk in model.chunks
            for entry, live in gpt_model.named_shards([gpt_model.unwrap(chunk)], pieces[0], config, "scalar")
        ]
        result["moved"] = [name for name, live in shards if live.main_grad.abs().max() > 0]
    result["second"] = model.update(batch)[0].values
    parts = batch.micro_batches
    result["correct"] = [(part.reward > 0).repeat_interleave(part.action_offsets.diff()) for part in parts]
    result["labels"] = [part.labels for part in parts]
    if head_init == "zeros":
        policy = trained_models.Policy(*pieces)
        learned = policy.update(batch, policy.score(batch), model.update(batch)[0])
        result["rate"] = learned["policy/learning_rate"]
    return result


@pytest.fixture(scope="module")
def results(model_folder, in_processes, tmp_path_factory):
    from oreal_megatron.records import Sample

    file = tmp_path_factory.mktemp("rules") / "rules.py"
    file.write_text(RULE)
    samples = [
        Sample((5, 6), tuple(7 + (number * 5 + t) % 9 for t in range(6 + number // 2)), reward, reward)
        for number, reward in enumerate((1.0, -1.0, -1.0, 1.0) * 3)  # both sides on each replica
    ]
    return in_processes(2, every_case, str(model_folder), samples, f"{file}:wrong_steps")


def outputs(results: list, layout: str, name: str) -> list[dict]:
    """Results of the ranks that hold the model's outputs."""
    cases = [rank[layout, name] for rank in results]
    return cases[1:] if layout == "stages" else cases


def moved(results: list, layout: str, name: str) -> set[str]:
    """Parameters with a gradient in the first step; each replica of the optimizer holds a share of it."""
    return {parameter for rank in results for parameter in rank[layout, name]["moved"]}


def sides(case: dict, step: str) -> tuple[torch.Tensor, torch.Tensor]:
    weight_T, correct_T = torch.cat(case[step]).cpu(), torch.cat(case["correct"])
    return weight_T[correct_T], weight_T[~correct_T]


@pytest.mark.parametrize("layout", ["replicas", "stages"])
def test_a_head_of_zeros_believes_one_half_and_moves_alone_in_the_first_step(results, layout):
    """Threshold 0.5 on the correct side: weight 0; 0 on the other: weight 0.5. Zeros pass no gradient to the layers."""
    for case in outputs(results, layout, "zeros"):
        right, wrong = sides(case, "first")
        assert (right == 0).all() and (wrong == 0.5).all()
        assert (sides(case, "second")[1] != 0.5).any(), "after one step the head tells responses apart"
    assert moved(results, layout, "zeros") == {"output_layer.weight"}
    assert all(rank[layout, "zeros"]["metrics"]["reward_model/score_mean"] == 0 for rank in results)


def test_a_drawn_head_trains_every_layer_from_the_first_step(results):
    assert all((sides(case, "first")[1] != 0.5).any() for case in outputs(results, "replicas", "normal"))
    assert len(moved(results, "replicas", "normal")) > 10


def test_the_control_permutes_each_side_s_weights_anew_in_every_step(results):
    pairs = zip(outputs(results, "replicas", "normal"), outputs(results, "replicas", "shuffled"), strict=True)
    for plain, shuffled in pairs:
        for step in ("first", "second"):
            for own, permuted in zip(sides(plain, step), sides(shuffled, step), strict=True):
                assert torch.equal(own.sort().values, permuted.sort().values)
            assert not torch.equal(sides(plain, step)[1], sides(shuffled, step)[1])


def test_ranks_that_hold_the_same_tokens_permute_equally(results):
    first, second = outputs(results, "ranks", "shuffled")
    assert all(map(torch.equal, first["first"], second["first"]))


@pytest.mark.parametrize(
    ("layout", "name"),
    [("replicas", "ruled"), ("replicas", "ruled, no reward model"), ("stages", "ruled, no reward model")],
)
def test_a_rule_weighs_every_micro_batch_with_and_without_a_reward_model(results, layout, name):
    for case in outputs(results, layout, name):
        assert len(case["first"]) == case["count"] > 1
        for weight_T, correct_T, label_T in zip(case["first"], case["correct"], case["labels"], strict=True):
            assert torch.equal(weight_T.cpu(), (correct_T | (label_T % 2 == 1)).float())


def test_the_first_policy_update_after_the_freeze_has_the_full_rate(results):
    assert {rank["replicas", "zeros"]["rate"] for rank in results} == {1e-3}
