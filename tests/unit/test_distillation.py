"""Losses of distillation against torch in fp64, what they do not depend on, and what `oreal distill` refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oreal_megatron import config as c
from oreal_megatron.algo import feature_imitation as imitation
from oreal_megatron.cli import main
from oreal_megatron.config import changes
from oreal_megatron.session.inputs import read_inputs
from oreal_megatron.training import distillation

CUTS = st.lists(st.integers(0, 30), max_size=4)


def draw(seed: int, tokens: int, channels: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of student and teacher, correlated; each channel with a scale up to 7 and a shift of up to 40 scales."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(tokens, channels, generator=generator, dtype=torch.float64) for _ in range(2))
    sides = []
    for z in (x, x * 0.5 + noise):
        scale, shift = (torch.rand(2, channels, generator=generator, dtype=torch.float64) * 2 - 1) * torch.tensor(
            [[2], [5]]
        )
        sides.append(((z - z.mean(0)) / z.std(0) * scale.exp() + shift).to(dtype))
    return sides[0], sides[1]


def loss_and_gradient(name: str, x: torch.Tensor, y: torch.Tensor, cuts: list[int] = ()):
    """Return loss and gradient in the trainer's two passes: moments of the parts, then the gradient of each."""
    edges = sorted({0, len(x), *(cut for cut in cuts if cut < len(x))})
    parts = [slice(*pair) for pair in zip(edges, edges[1:], strict=False)]
    sums = sum(imitation.moments(x[part], y[part]) for part in parts)
    channels, distance = imitation.statistics(sums, len(x)), imitation.DISTANCES[name]
    gradient = torch.cat([distance.gradient(x[part], y[part], channels, len(x)) for part in parts])
    return distance.loss(channels), gradient, channels


def plain_loss(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sum over channels of 1 - r, or of the mean squared difference, by torch's own functions."""
    if name == "mse":
        return sum(torch.nn.functional.mse_loss(a, b) for a, b in zip(x.T, y.T, strict=True))
    return sum(1 - torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(x.T, y.T, strict=True))


@pytest.mark.parametrize("name", imitation.DISTANCES)
@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 30), st.integers(1, 5), CUTS)
def test_loss_and_gradient_are_torch_s_however_the_tokens_are_cut(name, seed, tokens, channels, cuts):
    x, y = draw(seed, tokens, channels)
    x.requires_grad_()
    expected = plain_loss(name, x, y)
    expected.backward()
    loss, gradient, _ = loss_and_gradient(name, x.detach(), y, cuts)
    scale = 1 / x.detach().std(0) if name == "pearson" else x.detach().abs().amax(0) + y.abs().amax(0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-8, abs=1e-8)
    assert ((gradient - x.grad).abs() / scale).max() < 1e-8


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(3, 30), st.sampled_from([torch.float64, torch.float32]))
def test_scale_and_shift_of_a_teacher_s_channel_do_not_matter_to_the_correlation(seed, tokens, dtype):
    x, y = draw(seed, tokens, 4, dtype)
    scales, shifts = torch.tensor([0.01, 1.0, 30.0, 4.0]).to(dtype), torch.tensor([5.0, -2.0, 0.0, 100.0]).to(dtype)
    other = y * scales + shifts * (y * scales).std(0)
    results = [loss_and_gradient("pearson", x, teacher) for teacher in (y, other)]
    precision = 1e-8 if dtype is torch.float64 else 2e-3  # of a shift of 100 standard deviations
    assert results[0][0].item() == pytest.approx(results[1][0].item(), abs=precision)
    assert ((results[0][1] - results[1][1]) * x.std(0)).abs().max() < precision


def test_the_squared_error_depends_on_scale_and_shift():
    x, _ = draw(3, 20, 4)
    losses = [loss_and_gradient("mse", x, teacher)[0].item() for teacher in (x, x + 2, 3 * x)]
    assert losses[:2] == pytest.approx([0, 16], abs=1e-9) and losses[2] == pytest.approx(4 * x.square().mean(0).sum())


def test_the_loss_is_half_the_squared_gap_of_standardised_features_and_the_gradient_leads_to_it():
    x, y = draw(5, 20, 3)
    standard = [(z - z.mean(0)) / z.std(0, correction=0) for z in (x, y)]
    loss, gradient, channels = loss_and_gradient("pearson", x, y)
    assert loss.item() == pytest.approx((standard[0] - standard[1]).square().mean(0).sum().item() / 2)
    step = loss_and_gradient("pearson", x - 0.01 * channels.std**2 * gradient * len(x), y)[0]
    assert step < loss and loss_and_gradient("pearson", y * 3 + 1, y)[0] == pytest.approx(0, abs=1e-12)
    assert loss_and_gradient("pearson", x, -x)[0].item() == pytest.approx(6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("constant", [0.0, 1e-20, 0.1, 7.0, 1e4])
def test_a_constant_channel_has_no_correlation_and_no_gradient(constant, dtype):
    x, y = (value.to(dtype) for value in draw(1, 50, 4))
    x[:, 1], y[:, 2] = constant, constant
    loss, gradient, channels = loss_and_gradient("pearson", x, y)
    assert channels.varies.tolist() == [True, False, False, True] and loss.isfinite() and gradient.isfinite().all()
    assert channels.correlation[1:3].abs().sum() == 0 and gradient[:, 1:3].abs().sum() == 0 and gradient.abs().sum() > 0
    for tokens in (1, 0):
        loss, gradient, channels = loss_and_gradient("pearson", x[:1], y[:1])
        assert not channels.varies.any() and loss == 4 and gradient.abs().sum() == 0
        assert not imitation.statistics(torch.zeros(5, 4).double(), tokens).varies.any()


@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 300), st.integers(1, 5))
def test_rounding_of_a_constant_channel_is_no_variation(constant, tokens, ranks):
    """The sums of a step come from several ranks, and their variance is seldom exactly zero."""
    x = torch.full((tokens, 1), constant)
    sums = torch.stack([imitation.moments(part, part) for part in x.chunk(ranks)]).sum(0)
    channels = imitation.statistics(sums, tokens)
    assert not channels.varies.any() and channels.correlation.item() == 0
    assert imitation.pearson_gradient(x, x, channels, tokens).abs().sum() == 0


@given(st.integers(1, 80), st.integers(1, 80), st.data())
def test_layers_are_matched_by_depth(student, teacher, data):
    number = data.draw(st.integers(1, min(student, teacher)))
    pairs = imitation.match_layers(student, teacher, number)
    assert len(pairs) == number and pairs[-1] == (student - 1, teacher - 1)
    for layers, depth in zip(zip(*pairs, strict=True), (student, teacher), strict=True):
        assert layers[0] >= 0 and all(a < b for a, b in zip(layers, layers[1:], strict=False))
        assert all(abs((layer + 1) / depth - (n + 1) / number) <= 0.5 / depth + 1e-9 for n, layer in enumerate(layers))
    assert imitation.match_layers(student, student, student) == [(layer, layer) for layer in range(student)]


@pytest.fixture
def recipe(model_folder, tmp_path):
    """A configuration whose teacher is another model of the same shape."""
    return c.Config(
        run=str(tmp_path / "run"),
        model=c.ModelConfig(str(model_folder)),
        engine=c.EngineConfig(max_model_len=32, kv_cache_gib=0.05),
        distillation=c.DistillationConfig(str(model_folder)),
    )


def teacher_of(folder, tmp_path, **changes):
    """A copy of a model folder whose configuration says something else."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    stated = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(stated | changes))
    return other


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(teacher=""), "distillation.teacher names no model"),
        (dict(teacher="nowhere"), "does not exist; expected a folder with a Hugging Face model"),
        (dict(layers=5), "distillation.layers is 5, but student and teacher have 4 and 4 layers; set it to at most 4"),
    ],
)
def test_a_teacher_that_cannot_be_imitated_is_refused(recipe, changes, says):
    assert distillation.read_teacher(read_inputs(recipe))[1].layers == 4
    section = dataclasses.replace(recipe.distillation, **changes)
    with pytest.raises(c.ConfigError, match=says):
        distillation.read_teacher(read_inputs(dataclasses.replace(recipe, distillation=section)))


def test_another_width_needs_a_projection_or_logits_and_another_vocabulary_is_refused(recipe, model_folder, tmp_path):
    from small_model import make_model

    make_model(tmp_path / "narrow", seed=4, layers=3, hidden=64, heads=(2, 2))
    inputs = read_inputs(recipe)

    def read(folder, **changes):
        section = dataclasses.replace(recipe.distillation, teacher=str(folder), **changes)
        config = dataclasses.replace(inputs.config, distillation=section)
        return distillation.read_teacher(dataclasses.replace(inputs, config=config))

    with pytest.raises(c.ConfigError, match="64 channels, the student of 128; set distillation.projection=true .* or"):
        read(tmp_path / "narrow", layers=3)
    for objective in ("pearson", "mse"):
        assert read(tmp_path / "narrow", objective=objective, layers=3, projection=True)[1].hidden == 64
    for objective in ("pearson_logits", "kl_logits"):
        assert read(tmp_path / "narrow", objective=objective)[1].hidden == 64
    other = teacher_of(model_folder, tmp_path)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"7":', '"§":'))
    with pytest.raises(c.ConfigError, match="numbers its tokens otherwise"):
        read(other)


def test_pipeline_stages_are_refused(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    staged = dataclasses.replace(recipe, parallel=c.ParallelConfig(pipeline=2))
    with pytest.raises(c.ConfigError, match="parallel.pipeline is 2, but `oreal distill` compares layers"):
        distillation.read_teacher(read_inputs(staged))


def test_a_loss_without_a_term_is_refused():
    nothing = c.Config(distillation=c.DistillationConfig(coef=0.0, cross_entropy_coef=0.0))
    assert "nothing would be learned" in c.problems(nothing)[0]


@pytest.mark.parametrize("objective", ["pearson_logits", "kl_logits"])
def test_a_projection_of_logits_is_refused(objective):
    (message,) = c.problems(c.Config(distillation=c.DistillationConfig(objective=objective, projection=True)))
    assert message.startswith(f"distillation.projection is set, but distillation.objective={objective} compares logits")


def test_a_resumed_run_keeps_its_projections():
    before, after = (c.Config(distillation=c.DistillationConfig(projection=value)) for value in (False, True))
    with pytest.raises(c.ConfigError, match="distillation.projection: False -> True: fixed for an entire run"):
        changes.refuse_fixed("runs/x", changes.changes(before, after))


def test_the_command_refuses_before_it_loads(recipe, tmp_path, capsys):
    file = tmp_path / "recipe.py"
    file.write_text(
        "from oreal_megatron.config import *\n"
        f"def distil(): return Config(run={recipe.run!r}, model=ModelConfig({recipe.model.path!r}), "
        "engine=EngineConfig(max_model_len=32, kv_cache_gib=0.05), supervised=SupervisedConfig(path='x.jsonl'))"
    )
    assert main.main(["distill", str(file)]) == 2
    assert "distillation.teacher names no model" in capsys.readouterr().err
