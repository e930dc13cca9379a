"""Labelled rollouts, pairs and early stop of the reward model's own training; checks of reward_model.path."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oreal_megatron import config as c
from oreal_megatron.cli import main
from oreal_megatron.convert import to_hf
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.data import chat_template, labelled_rollouts, problems
from oreal_megatron.data.labelled_rollouts import LabelledPrompt, PairSampler
from oreal_megatron.models import architecture, tensors
from oreal_megatron.observe.recorder import Recorder
from oreal_megatron.records import PackingSpec, Sample, TokenWeights
from oreal_megatron.session.inputs import read_inputs
from oreal_megatron.training import reward_model


def prompt_of(slot: int, correct: int, incorrect: int) -> LabelledPrompt:
    """A prompt with so many rollouts of each outcome."""

    def samples(reward: float, first: int, count: int) -> tuple[Sample, ...]:
        return tuple(Sample((1,), (5, k), reward, 0.0, rollout=(slot, k)) for k in range(first, first + count))

    return LabelledPrompt(samples(1.0, 0, correct), samples(-1.0, correct, incorrect))


PROMPTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6).filter(
    lambda sizes: any(correct and incorrect for correct, incorrect in sizes)
)


@settings(max_examples=30)
@given(PROMPTS, st.integers(1, 7), st.integers(0, 50))
def test_pairs_are_of_one_prompt_and_an_epoch_has_every_rollout_of_the_mixed_ones(sizes, pairs_per_step, seed):
    prompts = [prompt_of(slot, *size) for slot, size in enumerate(sizes)]
    sampler = PairSampler(prompts, pairs_per_step, seed)
    steps = -(-sampler.pairs_per_epoch // pairs_per_step)
    taken = [sampler.take(step) for step in range(steps)]
    assert [PairSampler(prompts, pairs_per_step, seed).take(step) for step in reversed(range(steps))] == taken[::-1]
    samples = [sample for step in taken for sample in step]
    pairs = list(zip(samples[::2], samples[1::2], strict=True))
    assert all(a.reward > 0 > b.reward and a.rollout[0] == b.rollout[0] for a, b in pairs), "balanced by class"
    seen = {sample.rollout for pair in pairs[: sampler.pairs_per_epoch] for sample in pair}
    assert seen == {s.rollout for p in prompts if p.is_mixed for s in (*p.correct, *p.incorrect)}


def test_the_rarer_outcome_is_repeated_evenly():
    pairs = PairSampler([prompt_of(0, 2, 6)], 6, seed=1).take(0)
    counts = Counter(sample.rollout[1] for sample in pairs)
    assert counts == {0: 3, 1: 3, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1}


def test_prompts_are_held_out_entirely_and_too_few_are_refused():
    prompts = [prompt_of(slot, 2, 2) for slot in range(10)]
    training, held_out = labelled_rollouts.split(prompts, 0.25, seed=0)
    assert len(held_out) == 3 and sorted(training + held_out, key=prompts.index) == prompts
    assert labelled_rollouts.split(prompts, 0.25, seed=1)[1] != held_out
    for few in ([prompt_of(0, 2, 2)], [prompt_of(n, 3, 0) for n in range(9)], [prompt_of(n, 0, 2) for n in range(9)]):
        with pytest.raises(c.ConfigError, match="expected none of these numbers to be 0"):
            labelled_rollouts.split(few, 0.25, seed=0)


def renderer(tokenizer):
    """A function from a question to the tokens of its prompt."""
    return lambda question: chat_template.render(tokenizer, question, "")


def line(**changes) -> str:
    row = {"question": "3+4", "response": "7", "tokens": 2, "finished": True, "verdict": "correct"}
    return json.dumps(row | changes) + "\n"


def test_rollouts_are_read_as_they_were_sampled(model_folder, tmp_path):
    tokenizer = problems.load_tokenizer(str(model_folder))
    file = tmp_path / "rating.jsonl"
    cut = line(response="12", finished=False, verdict="incorrect")
    other = line(question="1+1", response="", verdict="incorrect", tokens=1)
    file.write_text(line() + cut + line(verdict="unknown") + other + line(response="11111111", tokens=9))
    loaded = labelled_rollouts.load(str(file), tokenizer, renderer(tokenizer), 30)
    first, second = loaded.prompts
    seven, twelve = (tuple(tokenizer.encode(text)) for text in ("7", "12"))
    assert first.correct[0] == Sample(
        renderer(tokenizer)("3+4"), (*seven, tokenizer.eos_token_id), 1.0, 0.0, rollout=(0, 0)
    )
    assert first.incorrect[0].response_tokens == twelve and first.incorrect[0].rollout == (0, 1)
    assert second.incorrect[0].response_tokens == (tokenizer.eos_token_id,) and not second.is_mixed
    assert (loaded.rollouts, loaded.retokenised, loaded.too_long) == (4, 0, 0)
    short = labelled_rollouts.load(str(file), tokenizer, renderer(tokenizer), len(renderer(tokenizer)("3+4")) + 4)
    assert (short.rollouts, short.too_long) == (3, 1)


def test_a_run_folder_is_read_over_all_its_steps_and_has_another_digest(model_folder, tmp_path):
    tokenizer = problems.load_tokenizer(str(model_folder))
    (tmp_path / "rollouts").mkdir()
    for step in range(2):
        (tmp_path / f"rollouts/step_{step:06d}.jsonl").write_text(line() + line(verdict="incorrect"))
    loaded = labelled_rollouts.load(str(tmp_path), tokenizer, renderer(tokenizer), 30)
    assert len(loaded.prompts) == 1 and len(loaded.prompts[0].correct) == 2 and loaded.retokenised == 0
    before = labelled_rollouts.digest(str(tmp_path))
    (tmp_path / "rollouts/step_000001.jsonl").write_text(line())
    assert labelled_rollouts.digest(str(tmp_path)) != before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (line() + line(verdict="right"), "line 2 is not a rollout with a verdict: .* verdict 'right'"),
        (json.dumps({"question": "q", "gold_answer": "1"}), "line 1 is not a rollout with a verdict: .* verdict None"),
        (line(question=""), "line 1 .* question is ''"),
        (line(response=None), "response None"),
        ("", "is empty"),
        (None, "does not exist"),
    ],
)
def test_a_file_of_something_else_is_refused_with_its_line(text, says, model_folder, tmp_path):
    file = tmp_path / "file.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(c.ConfigError, match=says):
        labelled_rollouts.load(str(file), problems.load_tokenizer(str(model_folder)), lambda question: (1, 2), 30)


class Scripted:
    """A reward model that counts its updates."""

    updates = 0

    def update(self, batch):
        self.updates += 1
        return TokenWeights([]), {"loss/reward_model": 0.5}


@pytest.mark.parametrize(
    ("aucs", "patience", "steps"),
    [
        ([0.5, 0.6, 0.7, 0.8, 0.9], 2, 4),
        ([0.5, 0.6, 0.6, 0.55, 0.9], 2, 3),
        ([0.5, 0.5, 0.5, 0.5, 0.5], 0, 4),
        ([0.5, 0.4, 0.6, 0.5, 0.9], 1, 1),
    ],
)
def test_training_stops_after_evaluations_without_a_higher_auc(aucs, patience, steps, tmp_path):
    training = c.RewardTrainingConfig(steps=4, pairs_per_step=1, patience=patience)
    config = c.Config(run=str(tmp_path / "run"), reward_training=training)
    run, model, sampler = Recorder(config), Scripted(), PairSampler([prompt_of(0, 1, 1)], 1, 0)

    class Hooks:
        def after_step(self, steps_done: int) -> None:
            run.metrics.log_evaluation(steps_done, {"auc": aucs[steps_done]})

    run.metrics.log_evaluation(0, {"auc": aucs[0]})
    assert reward_model.learn(config, sampler, model, run, Hooks(), PackingSpec(100)) == steps == model.updates
    assert run.metrics.first_and_best("auc") == (0.5, max(aucs[: steps + 1]), aucs.index(max(aucs[: steps + 1])))


def write_reward_model(folder: Path, source: HFFolder, **changes) -> str:
    """Write a reward model with the layers of a policy, some fields of config.json changed."""
    import torch

    config = architecture.with_head(source.config, "scalar") | changes
    arch = architecture.read(config)
    shapes = {}
    for entry in tensors.entries(arch, 1, 1, 0, "scalar"):
        shapes |= tensors.hf_shapes(entry, arch)
    named = ((name, torch.zeros(shape)) for name, shape in shapes.items())
    to_hf.save(folder, source.path, config, torch.float32, named, {})
    return str(folder)


def recipe_config(model: str, reward: str) -> c.Config:
    return c.Config(
        model=c.ModelConfig(model),
        engine=c.EngineConfig(max_model_len=32, kv_cache_gib=0.05),
        reward_model=c.RewardModelConfig(path=reward),
    )


def test_a_reward_model_of_another_shape_is_refused_and_its_digest_is_an_input(model_folder, tmp_path):
    source, policy = HFFolder(model_folder), str(model_folder)
    folder = write_reward_model(tmp_path / "same", source)
    inputs = read_inputs(recipe_config(policy, folder))
    digest = inputs.fingerprints()["reward_model.path"]
    assert inputs.reward_folder.shape("score.weight") == (1, inputs.arch.hidden) and len(digest) == 32
    off = dataclasses.replace(recipe_config(policy, folder), reward_model=c.RewardModelConfig(False, folder))
    assert read_inputs(off).reward_folder is None, "a run without reward model does not read it"

    small = write_reward_model(tmp_path / "small", source, num_hidden_layers=2)
    for path, says in (
        (small, f"reward_model.path is {small}, whose layers is 2; expected 4, that of {policy}"),
        (policy, f"reward_model.path is {policy}, a language model; expected a reward model"),
        (str(tmp_path / "nowhere"), "does not exist; expected a folder with a Hugging Face model"),
    ):
        with pytest.raises(c.ConfigError, match=says):
            read_inputs(recipe_config(policy, path))
    (tmp_path / "same/model.safetensors").unlink()
    shutil.copy(tmp_path / "small/model.safetensors", tmp_path / "same")
    with pytest.raises(c.ConfigError, match="has no tensor model.layers.2"):
        read_inputs(recipe_config(policy, folder))


def test_a_file_that_the_command_does_not_read_may_be_missing(model_folder, tmp_path):
    config = recipe_config(str(model_folder), "")
    config = dataclasses.replace(config, data=c.DataConfig(str(tmp_path / "missing.jsonl")))
    digests = read_inputs(config).fingerprints()
    assert digests["model.path"] and digests["data.path"] == ""


def test_the_command_asks_for_rollouts(model_folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from oreal_megatron.config import *\n"
        f"def made(): return Config(run={str(tmp_path / 'run')!r}, model=ModelConfig({str(model_folder)!r}), "
        "engine=EngineConfig(max_model_len=32, kv_cache_gib=0.05), steps=1)"
    )
    assert main.main(["reward-model", str(recipe)]) == 2
    assert "reward_training.path names no rollouts" in capsys.readouterr().err


def test_a_problem_s_own_system_message_is_in_the_prompt_as_in_training(model_folder, tmp_path):
    data = tmp_path / "problems.jsonl"
    messages = [{"role": "system", "content": "12"}, {"role": "user", "content": "3+4"}]
    data.write_text(json.dumps({"question": messages, "gold_answer": "7"}) + "\n")
    config = dataclasses.replace(recipe_config(str(model_folder), ""), data=c.DataConfig(str(data)))
    inputs = read_inputs(config)
    render = reward_model.prompt_renderer(inputs)
    assert render("3+4") == inputs.rendered(str(data))[0].tokens
    assert render("5+5") == chat_template.render(inputs.tokenizer, "5+5", "")
