"""Distillation through real Megatron: losses and gradients equal those of transformers in fp64, at every layout."""

from __future__ import annotations

import pytest
import torch
from full_gradients import completed, distance, whole

FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
COEF, CROSS_ENTROPY_COEF, TEMPERATURE = 3.0, 0.5, 2.0
OBJECTIVES = ("pearson", "mse", "pearson_logits", "kl_logits")
ALONE = {"one micro-batch": ({}, 10_000), "many": ({}, 40), "recomputed": ({}, 60, FULL)}
PAIRS = {
    "sequence parallel": (dict(tensor=2, sequence=True), 60),
    "data parallel": ({}, 40),
    "tensor parallel": (dict(tensor=2), 60),
    "context parallel": (dict(context=2), 60),
}


def steps(folders: dict, layouts: dict, objectives: tuple, samples: list, offload: bool = False) -> dict:
    """For each layout and objective: metrics and gradients of one step."""
    from megatron.core import parallel_state

    from oreal_megatron import config as c
    from oreal_megatron.mcore import parallel

    results = {}
    parallel.start_process_group()
    for layout, (axes, budget, *more) in layouts.items():
        parallel.start_megatron(c.ParallelConfig(**axes), seed=0)
        for objective in objectives:
            distillation = c.DistillationConfig(
                folders[objective], objective, 2, COEF, CROSS_ENTROPY_COEF, temperature=TEMPERATURE
            )
            config = c.Config(
                parallel=c.ParallelConfig(**axes),
                tokens_per_micro_batch=budget,
                megatron=dict(*more),
                offload=offload,
                optimizer=c.OptimizerConfig(clip_grad=1e9),
                supervised=c.SupervisedConfig(optimizer=c.OptimizerConfig(lr=1e-3, warmup_steps=0)),
                distillation=distillation,
            )
            results[layout, objective] = one_step(folders["student"], folders[objective], config, samples)
        parallel_state.destroy_model_parallel()
    parallel.start_megatron(c.ParallelConfig(), seed=0)
    parallel.stop()
    return results


def one_step(student: str, teacher: str, config, samples: list) -> tuple[dict, dict]:
    from oreal_megatron.algo import packing
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import distillation, gpt_model, parallel, trained_models
    from oreal_megatron.models import architecture

    source, goal = HFFolder(student), HFFolder(teacher)
    arch, teacher_arch = architecture.read(source.config), architecture.read(goal.config)
    frozen = trained_models.Reference(teacher_arch, config, goal.tensor)
    policy = distillation.Student(arch, config, source.tensor, frozen, teacher_arch)
    metrics = policy.imitate(packing.batch(samples, parallel.packing_spec(config.tokens_per_micro_batch, arch)))
    assert policy.updates == 1
    if config.offload:
        return metrics, {}
    completed(policy)
    shards = gpt_model.named_shards([gpt_model.unwrap(chunk) for chunk in policy.chunks], arch, config, "lm")
    return metrics, whole({entry: live.main_grad for entry, live in shards}, "lm")


def features(model, sample, layers: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Outputs of layers, and logits, where a response's tokens are predicted."""
    outputs: dict[int, torch.Tensor] = {}
    hooks = [
        model.model.layers[layer].register_forward_hook(
            lambda module, arguments, output, layer=layer: outputs.update({layer: output})
        )
        for layer in layers
    ]
    logits = model(torch.tensor([[*sample.prompt_tokens, *sample.response_tokens]])).logits[0]
    for hook in hooks:
        hook.remove()
    rows = slice(len(sample.prompt_tokens) - 1, -1)
    return [outputs[layer][0][rows] for layer in layers], logits[rows]


def imitated(objective: str, own: list, goal: list) -> torch.Tensor:
    """The objective by its definition, from (layers, logits) of each sample."""
    if objective == "kl_logits":
        q, p = (torch.cat([x[1] for x in side]).div(TEMPERATURE).log_softmax(1) for side in (goal, own))
        return TEMPERATURE**2 * (q.exp() * (q - p)).sum(1).mean()
    if objective == "pearson_logits":
        pairs = [[torch.cat([x[1] for x in side]) for side in (own, goal)]]
    else:
        pairs = [[torch.cat([x[0][layer] for x in side]) for side in (own, goal)] for layer in range(2)]
    if objective == "mse":
        return torch.stack([(x - y).square().mean() for x, y in pairs]).mean()
    centred = [[z - z.mean(0) for z in pair] for pair in pairs]
    return torch.stack([1 - torch.cosine_similarity(x, y, dim=0).mean() for x, y in centred]).mean()


def expected(folders: dict, objective: str, samples: list) -> tuple[dict, dict]:
    """Losses and gradients of transformers in fp64, by Megatron's names."""
    from transformers import AutoModelForCausalLM

    from oreal_megatron.models import architecture, tensors

    load = AutoModelForCausalLM.from_pretrained
    student, teacher = (load(folders[name], dtype=torch.float64) for name in ("student", objective))
    layers = [student.config.num_hidden_layers, teacher.config.num_hidden_layers]
    own_layers, goal_layers = ([round(count / 2) - 1, count - 1] for count in layers)
    own = [features(student, sample, own_layers) for sample in samples]
    with torch.no_grad():
        goal = [features(teacher, sample, goal_layers) for sample in samples]
    labels = torch.tensor([token for sample in samples for token in sample.response_tokens])
    cross_entropy = torch.nn.functional.cross_entropy(torch.cat([logits for _, logits in own]), labels)
    term = imitated(objective, own, goal)
    total = CROSS_ENTROPY_COEF * cross_entropy + COEF * term
    total.backward()
    gradients = {name: value.grad for name, value in student.named_parameters()}
    arch, mapped = architecture.read(student.config.to_dict()), {}
    for entry in tensors.entries(arch, 1, 1, 0, "lm"):
        value = tensors.to_megatron(entry, arch, gradients.__getitem__)
        mapped["lm", entry.megatron] = value[:80] if entry.sharding is tensors.Sharding.VOCABULARY else value
    losses = {"loss/cross_entropy": cross_entropy, "loss/distillation": term, "loss/total": total}
    return {name: value.item() for name, value in losses.items()}, mapped


@pytest.fixture(scope="module")
def folders(model_folder, tmp_path_factory) -> dict[str, str]:
    """A student of two layers, a teacher of four, and one of another width."""
    from small_model import make_model  # imports Triton, before the interpreter is chosen

    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "student", seed=3, layers=2)
    make_model(folder / "narrow", seed=4, layers=3, hidden=64, heads=(2, 2))
    teacher, narrow = str(model_folder), str(folder / "narrow")
    return {
        "student": str(folder / "student"),
        "pearson": teacher,
        "mse": teacher,
        "pearson_logits": narrow,
        "kl_logits": narrow,
    }


def check(results: dict, wanted: dict) -> None:
    for (layout, objective), (metrics, gradients) in results.items():
        losses, wanted_gradients = wanted[objective]
        assert {name: metrics[name] for name in losses} == pytest.approx(losses, rel=1e-4), (layout, objective)
        if gradients:
            gap = distance(wanted_gradients, {name: value.double() for name, value in gradients.items()})
            assert gap < 1e-3, (layout, objective, gap)


def checked(folders: dict, layouts: dict, objectives: tuple, samples: list, wanted: dict) -> None:
    """Compare on every rank."""
    check(steps(folders, layouts, objectives, samples), wanted)


@pytest.fixture(scope="module")
def oracle(folders):
    cache = {}

    def compute(samples: list) -> dict:
        if not cache:
            cache.update({objective: expected(folders, objective, samples) for objective in OBJECTIVES})
        return cache

    return compute


def test_losses_and_gradients_equal_transformers_whatever_the_packing(folders, oracle, make_samples, in_processes):
    samples = make_samples(6, seed=11)
    results = in_processes(1, steps, folders, ALONE, OBJECTIVES, samples)[0]
    check(results, oracle(samples))
    assert results["many", "pearson"][0]["distillation/constant_channels"] == 0
    offloaded = in_processes(1, steps, folders, {"offloaded": ({}, 60)}, OBJECTIVES[1:3], samples, True)[0]
    check(offloaded, oracle(samples))


def test_losses_and_gradients_equal_transformers_at_every_layout(folders, oracle, make_samples, in_processes, full):
    samples = make_samples(6, seed=11)
    layouts, objectives = (PAIRS, OBJECTIVES) if full else (dict(list(PAIRS.items())[:2]), ("pearson", "kl_logits"))
    in_processes(2, checked, folders, layouts, objectives, samples, oracle(samples))
