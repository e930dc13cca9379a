"""Every layout and every cut into micro-batches gives the same losses, the same gradient of every parameter and the
same updated weights, through real Megatron on gloo; and they agree with transformers and the plain formulas.

Each case is one step of policy and reward model on samples that are like a step's rollouts. By default some layouts of
four processes; with --full all of them.
"""

from __future__ import annotations

import dataclasses
import math
import random
from functools import partial

import pytest
import torch
from full_gradients import completed, distance, whole

FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
# Layout, tokens of a micro-batch, further fields of Megatron's.
CUTS = {
    "each sequence alone": ({}, 1),
    "many micro-batches": ({}, 40),
    "fused rotary embedding": ({}, 60, dict(apply_rope_fusion=True)),
    "deterministic": ({}, 60, dict(deterministic_mode=True)),
}  # the last, because the switch stays on
PAIRS = {  # two processes
    "data parallel": ({}, 60),
    "tensor parallel": (dict(tensor=2), 60),
    "sequence parallel": (dict(tensor=2, sequence=True), 60),
    "pipeline parallel": (dict(pipeline=2), 60),
    "interleaved pipeline": (dict(pipeline=2, virtual=2), 40),  # an odd number of micro-batches gets an empty one
    "context parallel": (dict(context=2), 60),
    "overlapping communication": (dict(overlap=True), 40),
    "full recomputation": (dict(), 60, FULL),
    "selective recomputation": (dict(tensor=2), 60, dict(recompute_granularity="selective", apply_rope_fusion=True)),
    "planted: each rank divides by its own tokens": ({}, 60),
}
FOURS = {  # four processes
    "tensor x pipeline": (dict(tensor=2, pipeline=2), 60),
    "sequence x context": (dict(tensor=2, sequence=True, context=2), 60),
    "interleaved x data": (dict(pipeline=2, virtual=2), 40),
    "context x data": (dict(context=2), 60),
    "more tensor-parallel ranks than key-value groups": (dict(tensor=4), 60),
    "the same, sequence-parallel": (dict(tensor=4, sequence=True), 60),
    "sequence x data": (dict(tensor=2, sequence=True), 60),
    "sequence x pipeline": (dict(tensor=2, sequence=True, pipeline=2), 60),
    "interleaved, overlapping": (dict(pipeline=2, virtual=2, overlap=True), 40),
    "recomputed with everything": (dict(tensor=2, sequence=True, context=2), 60, FULL),
    "context x pipeline": (dict(context=2, pipeline=2), 60),
    "context of four": (dict(context=4), 60),
    "four pipeline stages": (dict(pipeline=4), 60),
    "four replicas": ({}, 60),
}
QWEN3 = ("tensor parallel", "pipeline parallel", "interleaved pipeline")
FEW = ("tensor x pipeline", "sequence x context", "interleaved x data", "context x data")
LEARNING_RATE = 1e-2


def matrix(
    folders: list[str],
    layouts: dict[str, tuple],
    samples: list,
    dtype: str = "float32",
    objective: str = "mean",
    loss: dict | None = None,
) -> dict:
    """For each layout and folder: metrics, gradients and updated weights of policy and reward model."""
    from megatron.core import parallel_state

    from oreal_megatron import config as c
    from oreal_megatron.mcore import parallel

    optimizer = c.OptimizerConfig(lr=LEARNING_RATE, warmup_steps=0, clip_grad=1e9)  # a clip that never bites
    results = {}
    parallel.start_process_group()
    for name, (layout, budget, *more) in layouts.items():
        config = c.Config(
            model=c.ModelConfig(dtype=dtype),
            parallel=c.ParallelConfig(**layout),
            optimizer=optimizer,
            # A head of zeros passes no gradient.
            reward_model=c.RewardModelConfig(head_init="normal", objective=objective, optimizer=optimizer),
            weights=c.WeightsConfig(threshold_correct=0.3, threshold_incorrect=0.3),
            loss=c.LossConfig(**dict(kl_coef=0.5, ratio_cap=1.2, ratio_tokens="carried") | (loss or {})),
            tokens_per_micro_batch=budget,
            megatron=dict(*more),
        )
        parallel.start_megatron(config.parallel, seed=0)
        for folder in folders:
            results[name, folder] = one_step(folder, config, samples, planted=name.startswith("planted"))
        parallel_state.destroy_model_parallel()
    parallel.start_megatron(c.ParallelConfig(), seed=0)
    parallel.stop()
    return results


def one_step(folder: str, config, samples: list, planted: bool) -> tuple[dict, dict, dict]:
    from oreal_megatron.algo import packing, selection
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import gpt_model, parallel, trained_models
    from oreal_megatron.models import architecture

    source = HFFolder(folder)
    arch = architecture.read(source.config)
    pieces = (arch, config, source.tensor)
    policy, reference, judge = (
        trained_models.Policy(*pieces),
        trained_models.Reference(*pieces),
        trained_models.TokenRewardModel(*pieces),
    )
    assert torch.are_deterministic_algorithms_enabled() == config.megatron.get("deterministic_mode", False)
    spec = parallel.packing_spec(config.tokens_per_micro_batch, arch)
    batch = packing.batch(samples, spec)
    if planted:
        share = packing._deal_samples(samples, spec.ranks, spec.even_tokens)[spec.rank]
        batch = dataclasses.replace(batch, counts=selection.counts(share))
    token_weights, metrics = judge.update(batch)
    reference_logp = reference.score(batch)
    # As if the policy had moved, so that the KL counts.
    metrics |= policy.update(batch, reference_logp and [logp + 0.5 for logp in reference_logp], token_weights)
    gradients, weights = {}, {}
    for trainer, head in ((policy, "lm"), (judge, "scalar")):
        chunks = [gpt_model.unwrap(chunk) for chunk in trainer.chunks]
        completed(trainer)
        placed = list(gpt_model.named_shards(chunks, arch, config, head))
        gradients |= whole({entry: live.main_grad for entry, live in placed}, head)
        with trainer.readable():
            weights |= whole({entry: live.detach() for entry, live in placed}, head)
    return metrics, gradients, weights


def off(wanted: dict, got: dict) -> float:
    """By how many learning rates an update differs, of the worst tensor. Adam turns rounding of the few gradients near
    zero into whole steps, hence the mean square."""
    gaps = ((got[name] - value).square().mean().sqrt().item() for name, value in wanted.items())
    return max(gaps) / LEARNING_RATE


def check(results: dict, wanted: dict) -> None:
    for (name, folder), (metrics, gradients, weights) in results.items():
        wanted_metrics, wanted_gradients, wanted_weights = wanted[folder]
        if name.startswith("planted"):
            assert distance(wanted_gradients, gradients) > 0.1, "a wrong loss scale would go unseen"
            continue
        assert wanted_metrics["loss/kl"] > 0 and wanted_metrics["policy/gradient_norm"] > 0
        # Where weights are gathered under the next forward, those of other ranks still count as they were.
        told = [key for key in wanted_metrics if "overlapping" not in name or not key.endswith("largest_weight")]
        assert metrics.keys() == wanted_metrics.keys()
        for key in told:
            assert metrics[key] == pytest.approx(wanted_metrics[key], rel=1e-5, abs=1e-7), (name, key)
        assert distance(wanted_gradients, gradients) < 1e-5, (name, distance(wanted_gradients, gradients))
        assert off(wanted_weights, weights) < 0.02, name


def compared(folders: list[str], layouts: dict[str, tuple], samples: list, wanted: dict) -> None:
    """On every rank, where the results are: all of them together are gigabytes."""
    check(matrix(folders, layouts, samples), wanted)


@pytest.fixture(scope="module")
def folders(tied_model_folder, write_model, tmp_path_factory) -> list[str]:
    """Qwen2 with one matrix for embedding and head, and Qwen3 with two, which norms queries and keys."""
    return [str(tied_model_folder), write_model(tmp_path_factory.mktemp("qwen3") / "qwen3", "Qwen3")]


@pytest.fixture
def rollouts(make_samples) -> list:
    return carried_by_earlier_versions(make_samples(6, seed=11))


@pytest.fixture(scope="module")
def alone(folders, in_processes):
    """Of one process: one micro-batch, for each folder; and the other cuts."""
    found = {}

    def run(samples: list) -> tuple[dict, dict]:
        if not found:
            found.update(in_processes(1, matrix, folders, {"one micro-batch": ({}, 10_000)}, samples)[0])
            found.update(in_processes(1, matrix, folders[:1], CUTS, samples)[0])
        wanted = {folder: found["one micro-batch", folder] for folder in folders}
        return wanted, found

    return run


def test_every_cut_gives_the_same_gradient(alone, rollouts):
    wanted, cuts = alone(rollouts)
    check(cuts, wanted)


@pytest.mark.parametrize("world, layouts", [(2, PAIRS), (4, FOURS)], ids=["two processes", "four processes"])
def test_every_layout_gives_the_same_gradient(world, layouts, folders, alone, rollouts, in_processes, full):
    cases = [(folders, layouts)]
    if not full and world == 2:  # Qwen3, whose head and norms of queries and keys are cut too
        cases = [(folders[:1], layouts), (folders[1:], {name: PAIRS[name] for name in QWEN3})]
    elif not full:
        cases = [(folders[:1], {name: FOURS[name] for name in FEW})]
    for some, chosen in cases:
        in_processes(world, compared, some, chosen, rollouts, alone(rollouts)[0], timeout_s=600.0)


def test_mixtures_of_experts_give_the_same_gradient(write_model, rollouts, in_processes, tmp_path):
    folder = write_model(tmp_path / "mixture", "Qwen3Moe")
    alone = in_processes(1, matrix, [folder], {"one micro-batch": ({}, 10_000)}, rollouts)[0]
    layouts = {name: PAIRS[name] for name in ("data parallel", "sequence parallel")}
    for rank in in_processes(2, matrix, [folder], layouts, rollouts):
        check(rank, {folder: alone["one micro-batch", folder]})


def test_the_prefix_objective_gives_the_same_gradient(folders, alone, rollouts, in_processes):
    folder, one, pairs = folders[0], {"one micro-batch": ({}, 10_000)}, ("context parallel", "interleaved pipeline")
    reference = in_processes(1, matrix, [folder], one, rollouts, "float32", "prefix")[0]["one micro-batch", folder]
    mean = alone(rollouts)[0][folder]
    assert distance(mean[1], reference[1]) > 0.1, "it would be the objective of the mean"
    for rank in in_processes(2, matrix, [folder], {name: PAIRS[name] for name in pairs}, rollouts, "float32", "prefix"):
        check(rank, {folder: reference})


ONE = {"one micro-batch": ({}, 10_000)}
TERM = """
def k2(logp_T, tokens, counts):
    gap_T = logp_T - tokens.reference_logp
    moved = (logp_T - tokens.old_logp).detach().abs().sum() / counts.action_tokens
    return 0.5 * (gap_T * gap_T / 2).sum() / counts.action_tokens, {"moved": moved}
"""


@pytest.fixture
def term(tmp_path) -> dict:
    """Settings of a loss with k2 as a term of the user, in place of the built-in one."""
    (tmp_path / "own.py").write_text(TERM)
    return dict(kl_coef=0.0, kl_kind="k2", term=f"{tmp_path}/own.py:k2", entropy_coef=0.1)


@pytest.fixture
def fused(folders, rollouts, in_processes) -> dict:
    """Results of the same loss in the kernel, of one micro-batch and one process."""
    loss = dict(kl_coef=0.5, kl_kind="k2", entropy_coef=0.1)
    return in_processes(1, matrix, folders[:1], ONE, rollouts, "float32", "mean", loss)[0][
        "one micro-batch", folders[0]
    ]


def check_term(results: dict, reference: tuple, folder: str) -> None:
    for metrics, *_ in results.values():
        assert metrics.pop("own/moved") == 0.0, "before the first update the policy is the old one"
        assert metrics.pop("loss/term") == pytest.approx(0.5 * reference[0]["loss/kl"], rel=1e-5)
    check(results, {folder: reference})


def test_a_loss_term_of_the_user_gives_the_gradient_of_the_fused_loss(folders, rollouts, in_processes, term, fused):
    cuts = ONE | {"many micro-batches": CUTS["many micro-batches"]}
    check_term(in_processes(1, matrix, folders[:1], cuts, rollouts, "float32", "mean", term)[0], fused, folders[0])
    twice = in_processes(1, matrix, folders[:1], cuts, rollouts, "float32", "mean", term | dict(updates_per_step=2))[0]
    for metrics, *_ in twice.values():
        assert metrics["own/moved"] > 1e-4 and metrics["policy/updates"] == 2 and metrics["reward_model/updates"] == 1


@pytest.mark.full
def test_a_loss_term_gives_the_same_gradient_at_every_layout(folders, rollouts, in_processes, term, fused):
    layouts = {name: PAIRS[name] for name in ("sequence parallel", "context parallel", "interleaved pipeline")}
    for rank in in_processes(2, matrix, folders[:1], layouts, rollouts, "float32", "mean", term):
        check_term(rank, fused, folders[0])


def test_bfloat16_with_fp32_gradients_stays_close_to_float32(folders, alone, rollouts, in_processes):
    folder = folders[0]
    wanted = alone(rollouts)[0][folder]
    layouts = {"sequence parallel": (dict(tensor=2, sequence=True), 10_000)}  # one micro-batch
    got = in_processes(2, matrix, [folder], layouts, rollouts, "bfloat16")[0]["sequence parallel", folder]
    for name in ("loss/positive", "loss/negative", "loss/kl", "policy/gradient_norm"):
        assert got[0][name] == pytest.approx(wanted[0][name], rel=0.1, abs=0.02), name
    assert distance(wanted[1], got[1]) < 0.15
    assert all(torch.equal(value, value.bfloat16().float()) for value in got[2].values())
    products = {name: value for name, value in got[1].items() if "linear" in name[1] and name[1].endswith("weight")}
    assert products
    for name, value in products.items():
        assert not torch.equal(value, value.bfloat16().float()), f"{name} was rounded before it was added"


def losses_and_gradient_norms(folder: str, cases: list[tuple]) -> list[tuple[float, float]]:
    """Through Megatron, with a clip that never bites and a learning rate that changes nothing."""
    from oreal_megatron import config as c
    from oreal_megatron.algo import packing
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import parallel, trained_models
    from oreal_megatron.models import architecture
    from oreal_megatron.records import PackingSpec

    config = c.Config(model=c.ModelConfig(folder), optimizer=c.OptimizerConfig(clip_grad=1e9))
    source = HFFolder(folder)
    parallel.start_process_group()
    parallel.start_megatron(config.parallel, seed=0)
    policy = trained_models.Policy(architecture.read(source.config), config, source.tensor)
    results = []
    for samples, loss_config in cases:
        batch = packing.batch(samples, PackingSpec(60))
        objective = partial(_plain_objective, policy=policy, counts=batch.counts, config=loss_config)
        metrics = policy.train(batch, objective, 0.0)
        results.append((metrics["loss/total"], metrics["gradient_norm"]))
    parallel.stop()
    return results


def _plain_objective(number, micro_batch, hidden, policy, counts, config):
    reference, weight = (torch.full((len(micro_batch.labels),), value) for value in (-3.0, 0.7))
    return policy.language_model.oreal_loss(hidden, micro_batch, reference, weight, counts, config)


def carried_by_earlier_versions(samples: list) -> list:
    """Let earlier versions of the policy have written the first half of most responses, with log-probs around -4."""
    chance = random.Random(3)
    result = []
    for number, sample in enumerate(samples):
        tokens = len(sample.response_tokens)
        logprobs = tuple(-4.3 + chance.gauss(0, 0.7) for _ in range(tokens))
        result.append(dataclasses.replace(sample, engine_logprobs=logprobs, carried=(tokens + 1) // 2 * (number > 1)))
    return result


def test_loss_and_gradient_norm_equal_transformers_with_the_answer_by_answer_formula(
    model_folder, in_processes, make_samples
):
    """Compare responses that the policy wrote, and some whose first tokens are of earlier versions, in fp64."""
    from oreal_megatron import config as c

    samples = make_samples(4, seed=2)
    carried = c.LossConfig(ratio_cap=1.2, ratio_tokens="carried")
    cases = [(samples, c.LossConfig()), (carried_by_earlier_versions(samples), carried)]
    results = in_processes(1, losses_and_gradient_norms, str(model_folder), cases)[0]
    for (responses, config), (total, norm) in zip(cases, results, strict=True):
        expected_total, expected_norm = formula_by_answers(str(model_folder), responses, config.ratio_cap)
        assert total == pytest.approx(expected_total, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    assert results[0] != pytest.approx(results[1], rel=0.01), "the ratio would not matter"


def formula_by_answers(folder: str, samples: list, cap: float) -> tuple[float, float]:
    """Return Eq. 11 and its gradient's norm: incorrect samples' carried tokens have the ratio min(pi / mu, cap)."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder).double()
    correct_tokens, incorrect_tokens = (
        sum(len(s.response_tokens) for s in samples if s.reward * sign > 0) for sign in (1, -1)
    )
    ratios, expected = [], 0
    for sample in samples:
        ids = torch.tensor([sample.prompt_tokens + sample.response_tokens])
        logits = model(ids).logits[0, len(sample.prompt_tokens) - 1 : -1]
        logp = torch.log_softmax(logits, -1)[torch.arange(len(logits)), ids[0, len(sample.prompt_tokens) :]]
        if sample.reward > 0:
            expected = expected - (0.7 * sample.advantage * logp).sum() / correct_tokens
        else:
            ratio = torch.exp(logp - logp.detach())
            for token in range(sample.carried):
                behaviour = float(torch.tensor(sample.engine_logprobs[token]))
                ratios.append(min(math.exp(float(logp[token]) - behaviour), cap))
                ratio = ratio * torch.where(torch.arange(len(ratio)) == token, ratios[-1], 1.0)
            expected = expected - 0.5 * (0.7 * sample.advantage * ratio).sum() / incorrect_tokens
        difference = -3.0 - logp
        expected = expected + 0.01 * (difference.exp() - difference - 1).sum() / (correct_tokens + incorrect_tokens)
    assert not ratios or min(ratios) < 0.9 < cap == max(ratios), "ratios on both sides of 1, and truncated ones"
    expected.backward()
    return expected.item(), torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
