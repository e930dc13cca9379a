"""Distillation through real Megatron: losses and gradients equal those of transformers in fp64, at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from full_gradients import completed, distance, whole

FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
COEF, CROSS_ENTROPY_COEF, TEMPERATURE = 3.0, 0.5, 2.0
OBJECTIVES = ("pearson", "mse", "pearson_logits", "kl_logits", "pearson projected", "mse projected")
SUMS = ("pearson", "kl_logits", "pearson projected")  # those that add up otherwise over ranks
SEED = 5  # which projections are drawn from
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
            distance, _, projected = objective.partition(" ")
            distillation = c.DistillationConfig(
                folders[objective], distance, 2, bool(projected), COEF, CROSS_ENTROPY_COEF, temperature=TEMPERATURE
            )
            config = c.Config(
                seed=SEED,
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


def student_of(student: str, teacher: str, config):
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import distillation, trained_models
    from oreal_megatron.models import architecture

    source, goal = HFFolder(student), HFFolder(teacher)
    arch, teacher_arch = architecture.read(source.config), architecture.read(goal.config)
    frozen = trained_models.Reference(teacher_arch, config, goal.tensor)
    return distillation.Student(arch, config, source.tensor, frozen, teacher_arch)


def take_step(policy, samples: list) -> dict:
    from oreal_megatron.algo import packing
    from oreal_megatron.mcore import parallel

    spec = parallel.packing_spec(policy.config.tokens_per_micro_batch, policy.arch)
    return policy.imitate(packing.batch(samples, spec))[1]


def one_step(student: str, teacher: str, config, samples: list) -> tuple[dict, dict]:
    policy = student_of(student, teacher, config)
    metrics = take_step(policy, samples)
    assert policy.updates == 1
    if config.offload:
        return metrics, {}
    completed(policy)
    gradients = whole({entry: live.main_grad for entry, live in policy.named_shards()}, "lm")
    for number, layer in enumerate(policy.projections or []):
        gradients["projection", number] = equal_on_all_ranks(layer.weight.main_grad).clone()
        equal_on_all_ranks(layer.weight.data)
    return metrics, gradients


def equal_on_all_ranks(value: torch.Tensor) -> torch.Tensor:
    import torch.distributed as dist

    ranks = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, value.contiguous())
    assert all(torch.equal(rank, value) for rank in ranks)
    return value


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


def imitated(objective: str, own: list, goal: list, maps: list) -> torch.Tensor:
    """The objective by its definition, from (layers, logits) of each sample and the projections, if any."""
    if objective == "kl_logits":
        q, p = (torch.cat([x[1] for x in side]).div(TEMPERATURE).log_softmax(1) for side in (goal, own))
        return TEMPERATURE**2 * (q.exp() * (q - p)).sum(1).mean()
    if objective == "pearson_logits":
        pairs = [[torch.cat([x[1] for x in side]) for side in (own, goal)]]
    else:
        pairs = [[torch.cat([x[0][layer] for x in side]) for side in (own, goal)] for layer in range(2)]
    if maps:
        pairs = [[x @ weight.T, y] for weight, (x, y) in zip(maps, pairs, strict=True)]
    if objective.startswith("mse"):
        return torch.stack([(x - y).square().mean() for x, y in pairs]).mean()
    centred = [[z - z.mean(0) for z in pair] for pair in pairs]
    return torch.stack([1 - torch.cosine_similarity(x, y, dim=0).mean() for x, y in centred]).mean()


def drawn_maps(width: int, teacher_width: int) -> list[torch.Tensor]:
    """The projections before the first step, by their definition: normal values of variance 1 / width."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = [torch.randn(teacher_width, width, generator=generator) / width**0.5 for _ in range(2)]
    return [weight.double().requires_grad_() for weight in drawn]


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
    maps = drawn_maps(student.config.hidden_size, teacher.config.hidden_size) if "projected" in objective else []
    term = imitated(objective, own, goal, maps)
    total = CROSS_ENTROPY_COEF * cross_entropy + COEF * term
    total.backward()
    gradients = {name: value.grad for name, value in student.named_parameters()}
    arch, mapped = architecture.read(student.config.to_dict()), {}
    for entry in tensors.entries(arch, 1, 1, 0, "lm"):
        value = tensors.to_megatron(entry, arch, gradients.__getitem__)
        mapped["lm", entry.megatron] = value[:80] if entry.sharding is tensors.Sharding.VOCABULARY else value
    mapped |= {("projection", number): weight.grad for number, weight in enumerate(maps)}
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
        "pearson projected": narrow,
        "mse projected": narrow,
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
    layouts, objectives = (PAIRS, OBJECTIVES) if full else (dict(list(PAIRS.items())[:3]), SUMS)
    in_processes(2, checked, folders, layouts, objectives, samples, oracle(samples))


def projected_config(folders: dict, axes: dict):
    from oreal_megatron import config as c

    optimizer = c.OptimizerConfig(lr=1e-2, warmup_steps=0)
    return c.Config(
        model=c.ModelConfig(folders["student"]),
        parallel=c.ParallelConfig(**axes),
        tokens_per_micro_batch=60,
        optimizer=optimizer,
        distillation=c.DistillationConfig(folders["pearson projected"], layers=2, projection=True),
    )


def projected(folders: dict, axes: dict):
    return student_of(folders["student"], folders["pearson projected"], projected_config(folders, axes))


def trainable(policy) -> list[torch.Tensor]:
    return [value.detach().clone() for chunk in policy.chunks for value in chunk.parameters()]


def saved_student(folders: dict, samples: list, path: str) -> dict:
    """Take two steps, saving between them, and the second one again in a fresh model; then load at another layout."""
    from megatron.core import parallel_state

    from oreal_megatron import config as c
    from oreal_megatron.algo import packing
    from oreal_megatron.mcore import checkpoint_state, parallel
    from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver
    from oreal_megatron.reshard import weight_sync

    axes = dict(tensor=2)
    parallel.start_process_group()
    parallel.start_megatron(c.ParallelConfig(**axes), seed=0)
    policy = projected(folders, axes)
    drawn = [layer.weight.detach().clone() for layer in policy.projections]
    batch = packing.batch(samples[:4], parallel.packing_spec(60, policy.arch))
    scored = policy.score(batch)
    logp, metrics = policy.imitate(batch)
    rows = [metrics]
    assert len(logp) == len(scored) and all(map(torch.equal, logp, scored)), "log-probs of before the step"
    saved, checkpoint = [layer.weight.detach().clone() for layer in policy.projections], Path(path) / "step_000001"
    exported = {name: value.clone() for name, value in weight_sync.full_tensors(policy)}
    CheckpointSaver(Path(path), {"policy": policy}, keep=1).save(1)
    rows.append(take_step(policy, samples[4:]))
    fresh = projected(folders, axes)
    checkpoint_state.load(checkpoint, {"policy": fresh})
    again = take_step(fresh, samples[4:])
    assert again == rows[1] and all(map(torch.equal, trainable(fresh), trainable(policy)))
    assert not any(map(torch.equal, drawn, saved)), "the projections were not trained"

    parallel_state.destroy_model_parallel()
    parallel.start_megatron(c.ParallelConfig(), seed=0)
    other = projected(folders, {})
    checkpoint_state.load(checkpoint, {"policy": other})
    assert all(torch.equal(layer.weight, value) for layer, value in zip(other.projections, saved, strict=True))
    parallel.stop()
    return exported


def test_projections_are_in_checkpoints_and_in_no_other_copy_of_the_policy(
    folders, make_samples, in_processes, tmp_path
):
    """Exact resume at one layout and equal bits at another; the engine's, saved and converted weights have none."""
    from oreal_megatron.convert import megatron_folder
    from oreal_megatron.convert.hf_folder import HFFolder

    exported = in_processes(2, saved_student, folders, make_samples(8, seed=2), str(tmp_path))[0]
    source, checkpoint = HFFolder(folders["student"]), tmp_path / "step_000001/policy"
    assert exported.keys() == source.files.keys()
    megatron_folder.describe(source, checkpoint, "lm", torch.float32)
    converted = megatron_folder.MegatronFolder(checkpoint)
    assert any("feature_projection" in key for key in converted.reader.tensors)
    assert all(torch.equal(converted.tensor(name), value) for name, value in exported.items())
