"""Every layout gives the same losses and the same updated weights, through real Megatron on gloo; and both agree with
transformers and the plain-torch losses."""

from __future__ import annotations

from functools import partial

import pytest
import torch

LAYOUTS = {  # world size; tensor, pipeline, virtual; tokens per micro-batch
    "one process, one micro-batch": (1, (1, 1, 1), 10_000),
    "one process, many micro-batches": (1, (1, 1, 1), 40),
    "data parallel": (2, (1, 1, 1), 60),
    "tensor parallel": (2, (2, 1, 1), 60),
    "pipeline parallel": (2, (1, 2, 1), 60),
    "interleaved pipeline": (2, (1, 2, 2), 40),  # an odd number of micro-batches, which gets an empty one
    "more tensor-parallel ranks than key-value groups": (4, (4, 1, 1), 60),
}
LEARNING_RATE = 1e-2


def two_steps(folders: list[str], layout: tuple, budget: int, samples: list, dtype: str = "float32"):
    """For each model, with and without reward model: metrics and full weights of the policy after two steps."""
    from oreal_megatron import config as c
    from oreal_megatron.convert.hf_folder import Folder
    from oreal_megatron.mapping import architecture
    from oreal_megatron.mcore import parallel

    optimizer = c.Optimizer(lr=LEARNING_RATE, warmup_steps=0, clip_grad=0.05)
    config = c.Config(
        model=c.Model(dtype=dtype),
        parallel=c.Parallel(*layout),
        optimizer=optimizer,
        reward_model=c.RewardModel(optimizer=optimizer),
        weights=c.Weights(threshold=0.3),
        loss=c.Loss(kl_coef=0.5),
        tokens_per_micro_batch=budget,
    )
    parallel.start_process_group()
    parallel.start_megatron(config.parallel, seed=0)
    results = {}
    for folder in folders:
        source = Folder(folder)
        pieces = (architecture.read(source.config), config, source.tensor)
        for reward_model in (True, False):
            results[folder, reward_model] = _train_twice(pieces, reward_model, samples)
    parallel.stop()
    return results


def _train_twice(pieces: tuple, reward_model: bool, samples: list):
    from oreal_megatron.algo import pack
    from oreal_megatron.cli import build
    from oreal_megatron.mcore import parallel, roles

    policy, reference = roles.Policy(*pieces), roles.Reference(*pieces)
    judge = roles.TokenRewardModel(*pieces) if reward_model else roles.NoRewardModel()
    batch = pack.batch(samples, pieces[1].tokens_per_micro_batch, *parallel.data_parallel())
    for _ in range(2):  # the second step has a KL that is not zero, and weights of an updated reward model
        weight, learned = judge.update(batch)
        metrics = learned | policy.update(batch, reference.score(batch), weight)
    return metrics, {name: tensor.clone() for name, tensor in build.full_tensors(policy)}


def test_every_layout_trains_the_same(model_folder, tied_model_folder, in_processes, make_samples):
    folders, samples = [str(model_folder), str(tied_model_folder)], make_samples(6, seed=11)
    results = {
        name: in_processes(world, two_steps, folders, layout, budget, samples)
        for name, (world, layout, budget) in LAYOUTS.items()
    }
    for case, (wanted_metrics, wanted_weights) in results["one process, one micro-batch"][0].items():
        assert wanted_metrics["loss/kl"] > 0 and wanted_metrics["policy/gradient_norm"] > 0
        for name, ranks in results.items():
            for metrics, weights in (rank[case] for rank in ranks):
                assert metrics == pytest.approx(wanted_metrics, rel=2e-4, abs=2e-6), (name, case)
                assert weights.keys() == wanted_weights.keys()
                for tensor, value in wanted_weights.items():
                    # Adam turns rounding of the few gradients near zero into whole steps, hence the mean square.
                    gap = (weights[tensor] - value).square().mean().sqrt().item() / LEARNING_RATE
                    assert gap < 0.02, f"{name} {case}: {tensor} is {gap:.3f} learning rates off"


def test_bfloat16_with_fp32_gradients_stays_close_to_float32(model_folder, in_processes, make_samples):
    arguments = ([str(model_folder)], (2, 1, 1), 60, make_samples(6, seed=11))
    exact, rounded = (in_processes(2, two_steps, *arguments, dtype)[0] for dtype in ("float32", "bfloat16"))
    wanted, got = (result[str(model_folder), False] for result in (exact, rounded))
    for name in ("loss/positive", "loss/negative", "loss/kl", "policy/gradient_norm"):
        assert got[0][name] == pytest.approx(wanted[0][name], rel=0.1, abs=0.02), name
    assert {value.dtype for value in got[1].values()} == {torch.bfloat16}
    gaps = [(got[1][name].float() - value).square().mean().sqrt().item() for name, value in wanted[1].items()]
    assert max(gaps) < 0.5 * LEARNING_RATE


def loss_and_gradient_norm(folder: str, samples: list):
    """Through Megatron, with a clip that never bites and a learning rate that changes nothing."""
    from oreal_megatron import config as c
    from oreal_megatron.algo import pack
    from oreal_megatron.convert.hf_folder import Folder
    from oreal_megatron.mapping import architecture
    from oreal_megatron.mcore import parallel, roles

    config = c.Config(model=c.Model(folder), optimizer=c.Optimizer(clip_grad=1e9))
    source = Folder(folder)
    parallel.start_process_group()
    parallel.start_megatron(config.parallel, seed=0)
    policy = roles.Policy(architecture.read(source.config), config, source.tensor)
    batch = pack.batch(samples, 60, 0, 1)
    objective = partial(_plain_objective, policy=policy, counts=batch.counts, config=config.loss)
    metrics = policy.train(batch, objective, 0.0)
    parallel.stop()
    return metrics["loss/total"], metrics["gradient_norm"]


def _plain_objective(number, micro_batch, hidden, policy, counts, config):
    from oreal_megatron.algo import loss

    tokens = len(micro_batch.labels)
    terms = loss.terms(torch.full((tokens,), -3.0), torch.full((tokens,), 0.7), micro_batch, counts, config)
    total, sums, _ = policy.language_model.oreal_loss(hidden, micro_batch, terms)
    return total, loss.metrics(total, sums, counts, config.kl_kind)


def test_loss_and_gradient_norm_equal_transformers_with_the_answer_by_answer_formula(
    model_folder, in_processes, make_samples
):
    from transformers import Qwen2ForCausalLM

    samples = make_samples(4, seed=2)
    total, norm = in_processes(1, loss_and_gradient_norm, str(model_folder), samples)[0]

    model = Qwen2ForCausalLM.from_pretrained(model_folder).double()
    right_tokens, wrong_tokens = (
        sum(len(s.response_tokens) for s in samples if s.reward * sign > 0) for sign in (1, -1)
    )
    expected = 0
    for sample in samples:
        ids = torch.tensor([sample.prompt_tokens + sample.response_tokens])
        logits = model(ids).logits[0, len(sample.prompt_tokens) - 1 : -1]
        logp = torch.log_softmax(logits, -1)[torch.arange(len(logits)), ids[0, len(sample.prompt_tokens) :]]
        if sample.reward > 0:
            expected = expected - (0.7 * sample.advantage * logp).sum() / right_tokens
        else:
            ratio = torch.exp(logp - logp.detach())
            expected = expected - 0.5 * (0.7 * sample.advantage * ratio).sum() / wrong_tokens
        difference = -3.0 - logp
        expected = expected + 0.01 * (difference.exp() - difference - 1).sum() / (right_tokens + wrong_tokens)
    expected.backward()
    expected_norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert norm == pytest.approx(expected_norm, rel=1e-4)
