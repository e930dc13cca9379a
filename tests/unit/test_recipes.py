"""The paper's recipes: their numbers, layouts that fit the models, and what they say about missing inputs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from oreal_megatron import settings
from oreal_megatron.config import Config, ConfigError, validate
from oreal_megatron.config.schema import config_keys
from oreal_megatron.config.user_functions import check_functions
from oreal_megatron.models import architecture
from oreal_megatron.session import model_checks
from oreal_megatron.session.inputs import read_inputs

FILE = Path(__file__).parent.parent.parent / "examples/recipes/oreal.py"
GPUS = {
    "oreal_7b": 32, "oreal_7b_8_gpus": 8, "oreal_7b_without_reward_model": 32,
    "oreal_7b_without_reward_model_8_gpus": 8, "oreal_dsr1_distill_qwen_7b": 32,
    "oreal_dsr1_distill_qwen_7b_8_gpus": 8, "oreal_32b": 128, "oreal_32b_32_gpus": 32,
}  # fmt: skip
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e6,
    "use_sliding_window": False, "vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4),
    "32b": dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
                num_key_value_heads=8),
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("OREAL_MODELS", "OREAL_DATA", "OREAL_RUNS", "OREAL_JUDGE_URLS", "OREAL_JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)


def recipe(name: str) -> Config:
    return settings.from_recipe(f"{FILE}:{name}")


def shape(name: str) -> architecture.Architecture:
    return architecture.read(QWEN | SHAPES["32b" if "32b" in name else "7b"])


def test_all_recipes_are_listed_here():
    with pytest.raises(ConfigError) as error:
        recipe("?")
    assert set(str(error.value).split("known are ")[1].split(", ")) == set(GPUS)


@pytest.mark.parametrize("name", GPUS)
def test_the_numbers_are_those_of_the_paper_and_the_released_configuration(name):
    config, alone = recipe(name), "without_reward_model" in name
    assert config.gpus == GPUS[name]
    assert (config.steps, config.policy_freeze_steps, config.reward_model.enabled) == (
        90,
        0 if alone else 10,
        not alone,
    )
    assert (config.data.prompts_per_step, config.sampling.rollouts_per_prompt) == (64, 16)
    assert (config.sampling.temperature, config.sampling.top_p, config.sampling.max_new_tokens) == (1.0, 0.9, 14000)
    assert (config.optimizer.lr, config.optimizer.min_lr, config.optimizer.warmup_steps) == (5e-7, 1e-7, 10)
    assert alone or (config.reward_model.optimizer.lr, config.reward_model.optimizer.min_lr) == (2e-6, 4e-7)
    for optimizer in (config.optimizer, config.reward_model.optimizer):
        assert (optimizer.weight_decay, optimizer.clip_grad) == (0.01, 1.0)
    assert alone or config.reward_model.optimizer.warmup_steps == 10
    loss = config.loss
    assert (loss.kl_coef, loss.kl_kind, loss.positive_coef, loss.negative_coef) == (0.01, "k3", 1.0, 0.5)
    assert loss.advantage_on_positives and config.selection.advantage == "leave_one_out"
    assert config.selection.keep == ("all" if alone else "pair")
    for rules in (config, Config()):
        assert (rules.policy_schedule, rules.reward_model.head_init) == ("steps", "zeros")
    weights = config.weights
    assert (weights.belief, weights.rescale) == ("prefix_mean", "threshold")
    assert (weights.threshold_correct, weights.threshold_incorrect) == (0.5, 0.5)
    assert config.verify.thinking_end == ("<conclude>", "**Final Answer**", "</think>")
    assert (config.engine.max_model_len, config.seed, config.checkpoint.every, config.evaluation.every) == (
        16384, 0, 10, 10,
    )  # fmt: skip
    assert config.data.buckets == ((0.0, 0.2, 6), (0.2, 0.4, 4), (0.4, 0.6, 4), (0.6, 0.8, 2))
    assert (r"\boxed{}" in config.data.system_prompt) == ("dsr1" not in name)


@pytest.mark.parametrize("name", GPUS)
def test_the_layout_cuts_the_model_and_the_world_evenly(name, monkeypatch):
    config, arch = recipe(name), shape(name)
    monkeypatch.setenv("WORLD_SIZE", str(config.gpus))
    arch.check_layout(config.parallel.tensor, config.parallel.pipeline)
    validate(config)
    model_checks.check_world(config, arch)
    model_checks.check_kv_cache(config, arch)
    replicas = config.gpus // config.engine.tensor
    assert config.engine.max_num_seqs * replicas == 1024, "every answer of a step has a place in an engine"
    assert config.parallel.tensor <= 8 and 8 % config.engine.tensor == 0, "tensor-parallel ranks share a machine"


def test_inputs_come_from_the_environment(monkeypatch, model_folder, tmp_path):
    monkeypatch.setenv("OREAL_MODELS", "/a")
    monkeypatch.setenv("OREAL_DATA", "/b")
    monkeypatch.setenv("OREAL_RUNS", "/c")
    monkeypatch.setenv("OREAL_JUDGE_URLS", "http://x:1, http://y:2,")
    config = recipe("oreal_7b")
    assert (config.model.path, config.data.path, config.run) == (
        "/a/OREAL-7B-SFT",
        "/b/oreal_prompts.jsonl",
        "/c/oreal_7b",
    )
    assert config.verify.judge.urls == ("http://x:1", "http://y:2")


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        (None, "requires a judge, and verify.judge.urls names none; set OREAL_JUDGE_URLS"),
        ("none", "models/OREAL-7B-SFT does not exist"),
        ("http://judge:8000", "models/OREAL-7B-SFT does not exist"),
    ],
)
def test_a_missing_judge_or_model_is_told_before_anything_is_loaded(judge, says, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    if judge:
        monkeypatch.setenv("OREAL_JUDGE_URLS", judge)
    with pytest.raises(ConfigError, match=says):
        read_inputs(recipe("oreal_7b_8_gpus"))


def test_missing_prompts_are_told_with_their_name(monkeypatch, model_folder):
    monkeypatch.setenv("OREAL_JUDGE_URLS", "none")
    config = settings.override(
        recipe("oreal_7b_8_gpus"), [f"model.path={model_folder}", "engine.max_model_len=64", "parallel.tensor=1",
                                    "engine.tensor=1",
                                    "parallel.sequence=false"],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="data/oreal_prompts.jsonl does not exist"):
        read_inputs(config).prompts(config.data.path)


@pytest.mark.parametrize("name", ["addition.py:oreal", "addition.py:oreal_without_reward_model",
                                  "addition.py:sft", "smollm2.py:oreal", "smollm2.py:sft",
                                  "checked.py:oreal", "checked.py:sft"])  # fmt: skip
def test_small_recipes_leave_room_for_their_answers(name):
    config = settings.from_recipe(str(FILE.parent / name))
    longest = max(config.sampling.max_new_tokens, config.evaluation.max_new_tokens)
    assert 2 * longest <= config.engine.max_model_len  # half for the question
    assert config.run.startswith("runs/") and config.data.held_out.startswith("runs/")


@pytest.mark.parametrize(
    ("arm", "keys"),
    [
        ("without_reward_model", {"reward_model.enabled"}),
        ("belief_of_token", {"weights.belief"}),
        ("prefix_objective", {"weights.belief", "reward_model.objective"}),
        ("shuffled_weights", {"weights.shuffle"}),
        ("true_errors", {"reward_model.enabled", "weights.rule"}),
        ("behaviour_cloning", {"reward_model.enabled", "loss.advantage_on_positives"}),
        ("token_reward_model", {"loss.advantage_on_positives"}),
        ("reward_shaping", {"reward_model.enabled", "selection.keep", "loss.negative_coef"}),
        ("reinforce", {"reward_model.enabled", "selection.keep", "loss.negative_coef", "selection.advantage",
                       "loss.normalise"}),
    ],
)  # fmt: skip
def test_an_arm_differs_from_oreal_in_its_switches_only(arm, keys):
    present, base = (settings.from_recipe(f"{FILE.parent}/checked.py:{name}") for name in (arm, "oreal"))
    values = [{key.path: key.value for key in config_keys(config)} for config in (present, base)]
    assert {path for path in values[0] if values[0][path] != values[1][path]} == keys


@pytest.mark.parametrize("file", sorted(FILE.parent.glob("*.py")), ids=lambda file: file.stem)
def test_no_example_recipe_has_settings_that_are_refused(file, monkeypatch):
    monkeypatch.setenv("OREAL_JUDGE_URLS", "http://judge.test:8000")
    names = [
        node.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and node.name[0] != "_"
        and not node.args.args
        and ast.unparse(node.returns or node) == "Config"
    ]
    assert names
    for name in names:
        config = settings.from_recipe(f"{file}:{name}")
        validate(config)
        check_functions(config)
