"""Advantage, loss term, reader and template of the user: their values, their checks, and their names in a recipe."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re

import fake_run
import pytest
import torch
from repository import ROOT

from oreal_megatron import config as c
from oreal_megatron import settings
from oreal_megatron.algo import advantages, loss_term, packing, selection
from oreal_megatron.config import ConfigError, RunStopped
from oreal_megatron.config.schema import FunctionKey, config_keys
from oreal_megatron.config.user_functions import check_functions, read_function
from oreal_megatron.data import demonstration_lines, problems
from oreal_megatron.data import user_functions as data_functions
from oreal_megatron.records import Counts, Outcome, Prompt, Rollout, Verdict
from oreal_megatron.session.inputs import read_inputs

OWN = """
from oreal_megatron.config import *

def advantage(rewards):
    return [3 * reward for reward in rewards]

def short(rewards):
    return rewards[1:]

def infinite(rewards):
    return [float("inf") for _ in rewards]

def words(rewards):
    return ["a" for _ in rewards]

def nothing(rewards):
    return None

def term(logp_T, tokens, counts):
    ratio_T = (logp_T - tokens.old_logp).exp()
    gain_T = ratio_T * tokens.advantage * tokens.weight + (tokens.reference_logp - logp_T) / tokens.length
    return -gain_T.sum() / counts.action_tokens, {"ratio": ratio_T.detach().sum() / counts.action_tokens}

def vector(logp_T, tokens, counts):
    return logp_T

def number(logp_T, tokens, counts):
    return 1.0

def detached(logp_T, tokens, counts):
    return logp_T.detach().sum()

def bad_metrics(logp_T, tokens, counts):
    return logp_T.sum(), {"a": "x"}

def reader(path):
    first, last = path.removeprefix("sums:").split("-")
    for a in range(int(first), int(last)):
        yield {"question": f"{a}+{a}=", "gold_answer": str(2 * a)}

def same_rows(path):
    return reader(path)

def no_rows(path):
    return []

def lists(path):
    return [[1, 2]]

def failing(path):
    raise OSError(f"no table {path}")

def template(question, system_prompt):
    return f"{system_prompt}Q:{question}A:"

def constant_template(question, system_prompt):
    return "Q"

def no_text(question, system_prompt):
    return 5
"""


@pytest.fixture
def own(tmp_path) -> str:
    """File of the user's functions."""
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


@pytest.fixture
def config(model_folder, tmp_path) -> c.Config:
    return c.Config(
        run=str(tmp_path / "run"),
        steps=3,
        policy_freeze_steps=1,
        model=c.ModelConfig(str(model_folder)),
        engine=c.EngineConfig(max_model_len=64),
        sampling=c.SamplingConfig(rollouts_per_prompt=4, max_new_tokens=8),
        optimizer=c.OptimizerConfig(warmup_steps=1),
        reward_model=c.RewardModelConfig(optimizer=c.OptimizerConfig(warmup_steps=1)),
    )


@pytest.mark.parametrize("setting", ["selection.advantage_rule", "loss.term", "data.reader", "data.template"])
def test_a_function_of_other_arguments_is_refused_by_name(setting, own):
    wrong = "term" if setting != "loss.term" else "advantage"
    with pytest.raises(ConfigError) as error:
        check_functions(settings.override(c.Config(), [f"{setting}={own}:{wrong}"]))
    assert f"{setting} is" in str(error.value) and "arguments: " in str(error.value)


def test_advantages_are_those_of_the_users_function(own):
    prompt = Prompt(0, "q", "1", None, (1, 2))
    rollouts = [[Rollout(prompt, 0, index, (5, 6), "t", True) for index in range(3)]]
    verdicts = [[Verdict(Outcome.CORRECT, "exact"), Verdict(Outcome.INCORRECT, "exact"), Verdict(Outcome.UNKNOWN, "")]]
    config = c.SelectionConfig(advantage_rule=f"{own}:advantage", keep="all")
    samples = selection.samples(rollouts, verdicts, config, (0, 0))
    assert [(sample.reward, sample.advantage) for sample in samples] == [(1.0, 3.0), (-1.0, -3.0)]


@pytest.mark.parametrize("name", ["short", "infinite", "words", "nothing"])
def test_advantages_that_are_not_a_number_per_reward_stop_the_run(name, own):
    rule = advantages.advantage_rule(c.SelectionConfig(advantage_rule=f"{own}:{name}"))
    with pytest.raises(RunStopped, match="selection.advantage_rule .* expected 2 finite numbers"):
        rule([1.0, -1.0])


def test_a_loss_term_and_its_gradient_equal_an_oracle_token_by_token(own, make_samples):
    samples = [dataclasses.replace(s, advantage=0.3 * n - 1) for n, s in enumerate(make_samples(4, seed=2))]
    batch = packing.micro_batch(samples)
    generator = torch.Generator().manual_seed(1)
    logp_T, old_T, reference_T, weight_T = torch.rand(4, len(batch.labels), generator=generator, dtype=torch.float64)
    counts = packing.counts(samples)
    term = loss_term.loss_term(c.Config(loss=c.LossConfig(term=f"{own}:term")))
    leaf = logp_T.clone().requires_grad_()
    value, metrics = term(leaf, loss_term.action_tokens(batch, reference_T, weight_T, old_T), counts)
    value.backward()
    total, ratios, slopes, number = 0.0, 0.0, [], 0
    for sample in samples:
        for _ in sample.response_tokens:
            logp, old, reference, weight = (float(v[number]) for v in (logp_T, old_T, reference_T, weight_T))
            ratio = math.exp(logp - old)
            # packing keeps advantages in fp32
            gain = ratio * float(torch.tensor(sample.advantage)) * weight
            total -= (gain + (reference - logp) / len(sample.response_tokens)) / counts.action_tokens
            slopes.append(-(gain - 1 / len(sample.response_tokens)) / counts.action_tokens)
            ratios += ratio / counts.action_tokens
            number += 1
    assert value.item() == pytest.approx(total, abs=1e-6)
    assert metrics.keys() == {"own/ratio"} and metrics["own/ratio"].item() == pytest.approx(ratios, abs=1e-6)
    torch.testing.assert_close(leaf.grad, torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vector", r"returned a tensor of shape \[3\]; expected a scalar"),
        ("number", "returned float; expected a scalar"),
        ("detached", "returned a number that does not depend on logp_T"),
        ("bad_metrics", "returned metrics {'a': 'x'}; expected a dictionary of numbers"),
    ],
)
def test_a_loss_term_that_trains_nothing_stops_the_run(name, says, own):
    term = loss_term.loss_term(c.Config(loss=c.LossConfig(term=f"{own}:{name}")))
    with pytest.raises(RunStopped, match=says):
        term(torch.zeros(3, requires_grad=True), None, Counts(1, 3, 3, 0))


TWO = "loss.updates_per_step=2"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([TWO], "loss.updates_per_step is 2, and the built-in term of incorrect samples takes the importance ratio as"),
        ([TWO, "loss.term=OWN:term"], "set loss.ratio_cap, e.g. to 2, with loss.ratio_tokens=all, or loss.negative_co"),
        ([TWO, "loss.ratio_cap=2", "loss.ratio_tokens=carried"], "loss.updates_per_step is 2, and the built-in term"),
        ([TWO, "loss.term=OWN:term", "loss.negative_coef=0"], ""),
        ([TWO, "loss.ratio_cap=2", "sampling.top_p=1.0"], ""),
        ([TWO, "loss.ratio_cap=2", "sampling.top_p=1.0", "loss.mini_batches=2"], ""),
        ([TWO, "loss.negative_coef=0"], ""),  # imitation of correct samples has no ratio
        (["loss.mini_batches=2"], "loss.mini_batches is 2 and loss.updates_per_step 1: each mini-batch needs equally"),
        (
            ["loss.mini_batches=64", "loss.updates_per_step=64", "loss.negative_coef=0", "data.prompts_per_step=63"],
            "loss.mini_batches is 64, but a step has 63 prompts",
        ),
        (
            [TWO, "loss.ratio_cap=2", "sampling.top_p=1.0", "rollout.round_tokens=8"],
            "loss.updates_per_step is 2 and rollout.carry is true",
        ),
    ],
)
def test_several_updates_need_a_ratio_equal_turns_and_rollouts_of_one_version(changes, says, own):
    config = settings.override(c.Config(), [change.replace("OWN", str(own)) for change in changes])
    if not says:
        c.validate(config)
        return
    with pytest.raises(ConfigError, match=re.escape(says)):
        c.validate(config)


def test_a_run_trains_on_rows_and_texts_of_the_users_functions(config, own, tmp_path):
    changes = [f"data.reader={own}:reader", f"data.template={own}:template", "data.path=sums:3-11"]
    config = settings.override(config, [*changes, "data.prompts_per_step=4", "checkpoint.every=1"])
    inputs = read_inputs(config)
    prompts = inputs.training_prompts()
    assert [prompt.gold for prompt in prompts] == [str(2 * a) for a in range(3, 11)]
    assert inputs.tokenizer.decode(prompts[0].tokens) == "Q:3+3=A:"
    assert fake_run.train(config)
    assert set(json.loads((tmp_path / "run/environment.json").read_text())["functions"]) == {
        "data.reader",
        "data.template",
    }
    with pytest.raises(ConfigError, match="data.path has other contents than when"):
        fake_run.train(settings.override(config, ["data.path=sums:4-12", "steps=4"]), resume="x")
    with pytest.raises(ConfigError, match="data.reader has other contents than when"):
        fake_run.train(settings.override(config, [f"data.reader={own}:same_rows"]), resume="x")


@pytest.mark.parametrize(
    ("setting", "name", "says"),
    [
        ("reader", "no_rows", "gave no rows of sums:1-5; expected at least one"),
        ("reader", "lists", r"gave \[1, 2\] as row 1 of sums:1-5; expected a dictionary"),
        ("reader", "failing", "failed on sums:1-5: OSError: no table sums:1-5"),
        ("template", "constant_template", "data.template renders the same prompt for different questions"),
        ("template", "no_text", "returned int; expected the text of the prompt"),
    ],
)
def test_readers_and_templates_that_cannot_work_are_refused(setting, name, says, config, own):
    names = {"reader": "reader", "template": "template", setting: name}
    changes = ["data.path=sums:1-5", *(f"data.{key}={own}:{value}" for key, value in names.items())]
    with pytest.raises(ConfigError, match=says):
        read_inputs(settings.override(config, changes)).training_prompts()


RECIPE = """
def recipe() -> Config:
    return Config(loss=LossConfig(term={term}), selection=SelectionConfig(advantage_rule=advantage))
"""


def test_a_recipe_names_functions_as_objects(own, tmp_path):
    (tmp_path / "recipe.py").write_text(OWN + RECIPE.format(term="term"))
    config = settings.from_recipe(f"{tmp_path}/recipe.py:recipe")
    assert config.loss.term == f"{tmp_path}/recipe.py:term"
    assert config.selection.advantage_rule == f"{tmp_path}/recipe.py:advantage"
    check_functions(config)


@pytest.mark.parametrize("term", ["lambda a, b, c: a.sum()", "(lambda f: lambda *x: f(*x))(term)"])
def test_an_object_that_no_resumed_run_can_find_is_refused(term, tmp_path):
    (tmp_path / "recipe.py").write_text(OWN + RECIPE.format(term=term))
    with pytest.raises(ConfigError, match="which a resumed run cannot read by its name"):
        settings.from_recipe(f"{tmp_path}/recipe.py:recipe")


def test_other_objects_are_no_names():
    with pytest.raises(ConfigError, match="loss.term is functools.partial"):
        c.validate(c.Config(loss=c.LossConfig(term=functools.partial(print))))


def test_demonstrations_use_the_template_and_a_chat_of_several_turns_is_refused(model_folder, own, tmp_path):
    tokenizer, template = problems.load_tokenizer(str(model_folder)), data_functions.template(f"{own}:template")
    file = tmp_path / "chats.jsonl"
    turns = [{"role": role, "content": "1"} for role in ("user", "assistant", "user", "assistant")]

    def load(line: dict) -> list:
        file.write_text(json.dumps(line) + "\n")
        return demonstration_lines.load_demonstrations(str(file), tokenizer, "s", 64, template=template)

    (sample,) = load({"question": "1+1=", "response": "2"})
    assert tokenizer.decode(sample.prompt_tokens) == tokenizer.decode(tokenizer.encode("sQ:1+1=A:"))
    assert load({"messages": turns[:2]})[0].prompt_tokens == tuple(tokenizer.encode("sQ:1A:"))
    with pytest.raises(ConfigError, match="line 1: data.template renders one question, but this chat has earlier"):
        load({"messages": turns})


PAGES = ("own_advantage", "own_reader", "own_template", "own_metric", "own_step_hook")


def test_the_functions_on_the_pages_of_extensions_work(tmp_path):
    pages = [(ROOT / f"docs/how_to/{page}.md").read_text() for page in PAGES]
    blocks = [re.search(r"```python\n# own.py\n(.*?)```", page, re.DOTALL)[1] for page in pages]
    (tmp_path / "own.py").write_text("\n".join(blocks))
    keys = {key.path: key.key for key in config_keys(c.Config()) if isinstance(key.key, FunctionKey)}

    def own(setting: str, name: str):
        return read_function(f"{tmp_path}/own.py:{name}", setting, keys[setting].arguments)

    assert own("selection.advantage_rule", "advantage")([1.0, -1.0]) == [1.0, -1.0]
    assert [row["gold_answer"] for row in own("data.reader", "reader")("sums:1-3")] == ["2", "4"]
    prompt = own("data.template", "template")("1+1=", "Be brief.")
    assert prompt == "Be brief.\nQuestion: 1+1=\nAnswer:"
    rollout = Rollout(Prompt(0, "1+1=", "2", None, (1,)), 0, 0, (2,), r"\boxed{2}", True)
    assert own("record.metric", "metric")([[rollout]], [[]]) == {"boxed_share": 1.0}
    own("record.after_step", "after_step")(3, {"reward/pass_rate": 0.5}, str(tmp_path))
    assert (tmp_path / "pass_rate.txt").read_text() == "3 0.500\n"
