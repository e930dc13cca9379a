"""Functions of the user in a run: recorded with the recipe, fixed for the run, refused by name if they cannot work."""

from __future__ import annotations

import json
import shutil
import sys

import fake_run
import pytest

from oreal_megatron import config as c
from oreal_megatron import settings
from oreal_megatron.cli import main
from oreal_megatron.config import Config, ConfigError, WeightsConfig
from oreal_megatron.config.user_functions import Origin, check_functions, read_function, read_source

RULE = "def rule(score_T, micro_batch, config):\n    return score_T * 0 + 1\n"
RECIPE = """
from oreal_megatron.algo import advantages, selection
from oreal_megatron.config import Config
from oreal_megatron.data.sampler import balanced
import functools, json
{patch}

def run():
    return Config()
"""
PATCHES = {
    "function": ("selection.samples = lambda *_: []", "oreal_megatron.algo.selection.samples"),
    "entry of a table": ("advantages.KINDS['leave_one_out'] = lambda *_: 0", "algo.advantages.KINDS.leave_one_out"),
    "method": (
        "from oreal_megatron.verify.grader import Grader\nGrader.submit = lambda *_: None",
        "verify.grader.Grader.submit",
    ),
    "static method": (
        "from oreal_megatron.verify.grader import Grader\nGrader._judged = staticmethod(lambda *_: None)",
        "verify.grader.Grader._judged",
    ),
    "partial": (
        "def own(*_): ...\nselection.summary = functools.partial(own, 1)",
        "oreal_megatron.algo.selection.summary",
    ),
    "class": ("class Other: ...\nselection.Rollout = Other", "oreal_megatron.algo.selection.Rollout"),
    "from a module beside it": ("import beside_the_recipe", "oreal_megatron.algo.selection.samples"),
}


@pytest.fixture
def config(model_folder, tmp_path) -> Config:
    """Eight steps, saved after every second one."""
    lines = [{"question": f"{a}+{b}=", "gold_answer": str(a + b)} for a in range(3) for b in range(4)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return c.Config(
        run=str(tmp_path / "run"),
        steps=8,
        policy_freeze_steps=1,
        model=c.ModelConfig(str(model_folder)),
        engine=c.EngineConfig(max_model_len=64),
        sampling=c.SamplingConfig(rollouts_per_prompt=4, max_new_tokens=8),
        data=c.DataConfig(str(tmp_path / "problems.jsonl"), prompts_per_step=4),
        optimizer=c.OptimizerConfig(warmup_steps=2),
        reward_model=c.RewardModelConfig(optimizer=c.OptimizerConfig(warmup_steps=2)),
        checkpoint=c.CheckpointConfig(every=2, keep=8),
    )


@pytest.fixture
def unpatched():
    """Undo what a test replaces."""
    from oreal_megatron.algo import advantages, selection
    from oreal_megatron.verify.grader import Grader

    tables = [(vars(selection), dict(vars(selection))), (advantages.KINDS, dict(advantages.KINDS))]
    methods = {name: vars(Grader)[name] for name in ("submit", "_judged")}
    yield
    for table, former in tables:
        table.update(former)
    for name, method in methods.items():
        setattr(Grader, name, method)
    sys.modules.pop("beside_the_recipe", None)


@pytest.mark.parametrize("name", PATCHES)
def test_a_recipe_that_replaces_parts_of_the_package_is_refused_by_name(name, tmp_path, unpatched, capsys):
    patch, says = PATCHES[name]
    (tmp_path / "beside_the_recipe.py").write_text(
        "from oreal_megatron.algo import selection\nselection.samples = lambda *_: []\n"
    )
    (tmp_path / "recipe.py").write_text(RECIPE.format(patch=patch))
    assert main.main(["config", f"{tmp_path}/recipe.py:run"]) == 2
    message = capsys.readouterr().err
    assert says in message and "a resumed run would not do" in message


def test_a_recipe_may_import_and_define_what_it_likes(tmp_path):
    (tmp_path / "recipe.py").write_text(
        RECIPE.format(patch="class Own(Config): ...\ndef own(): ...\nowned = functools.partial(balanced, 1)")
    )
    assert settings.from_recipe(f"{tmp_path}/recipe.py:run") == Config()


def test_command_recipe_and_functions_are_recorded_and_outlast_a_resume(config, tmp_path):
    (tmp_path / "rules.py").write_text(RULE)
    (tmp_path / "recipe.py").write_text("# the recipe\n")
    config = settings.override(config, [f"weights.rule={tmp_path}/rules.py:rule"])
    origin = Origin("oreal train recipe.py:run --set seed=0", read_source(f"{tmp_path}/recipe.py:run"))
    assert fake_run.train(config, origin=origin)
    before = json.loads((tmp_path / "run/environment.json").read_text())
    assert before["command"] == "oreal train recipe.py:run --set seed=0"
    assert before["recipe"]["text"] == "# the recipe\n" and before["recipe"]["path"] == str(tmp_path / "recipe.py")
    assert before["functions"]["weights.rule"]["text"] == RULE
    assert fake_run.train(
        settings.override(config, ["steps=10"]), resume="x", origin=Origin("oreal train --resume run")
    )
    after = json.loads((tmp_path / "run/environment.json").read_text())
    assert after["recipe"] == before["recipe"] and after["command"] == "oreal train --resume run"
    assert json.loads((tmp_path / "run/environment_before_step_8.json").read_text())["command"] == before["command"]


@pytest.mark.parametrize("change", ["other text", "other function", "none"])
def test_a_resumed_run_refuses_another_function(config, tmp_path, change):
    (tmp_path / "rules.py").write_text(RULE + RULE.replace("rule(", "other("))
    config = settings.override(config, [f"weights.rule={tmp_path}/rules.py:rule"])
    assert not fake_run.train(config, kill_at=("step is done", 5))
    if change == "other text":
        (tmp_path / "rules.py").write_text(RULE.replace("+ 1", "+ 2"))
    value = {"other function": f"{tmp_path}/rules.py:other", "none": ""}.get(change, f"{tmp_path}/rules.py:rule")
    with pytest.raises(ConfigError, match="weights.rule has other contents than when"):
        fake_run.train(settings.override(config, [f"weights.rule={value}"]), resume="x")


def test_a_function_may_move(config, tmp_path):
    (tmp_path / "rules.py").write_text(RULE)
    config = settings.override(config, [f"weights.rule={tmp_path}/rules.py:rule"])
    assert not fake_run.train(config, kill_at=("step is done", 5))
    (tmp_path / "other").mkdir()
    shutil.move(tmp_path / "rules.py", tmp_path / "other/rules.py")
    assert fake_run.train(settings.override(config, [f"weights.rule={tmp_path}/other/rules.py:rule"]), resume="x")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("json:loads", "with these 3 arguments: too many positional arguments"),
        ("json:nothing", "json has no function 'nothing'"),
        ("no.such.module:rule", "no.such.module cannot be imported"),
        ("rules.py:rule", "the file rules.py does not exist"),
        ("json", "NAME is missing"),
    ],
)
def test_functions_that_cannot_work_are_refused_by_name(name, says):
    with pytest.raises(ConfigError) as error:
        check_functions(Config(weights=WeightsConfig(rule=name)))
    assert says in str(error.value) and "weights.rule is" in str(error.value)


def test_a_function_of_a_module_is_read_and_its_file_recorded(tmp_path, monkeypatch):
    (tmp_path / "rules_of_a_module.py").write_text(RULE)
    monkeypatch.syspath_prepend(tmp_path)
    check_functions(Config(weights=WeightsConfig(rule="rules_of_a_module:rule")))
    assert read_source("rules_of_a_module:rule").text == RULE


def test_functions_of_one_file_share_its_state_until_the_file_changes(tmp_path, monkeypatch):
    file = tmp_path / "own.py"
    text = (
        "seen = []\ndef rule(rewards):\n    seen.append(rewards)\n    return rewards\ndef metric(rollouts, verdicts):\n"
    )
    file.write_text(f"{text}    return {{'seen': len(seen)}}\n")
    monkeypatch.chdir(tmp_path)
    rule = read_function("own.py:rule", "selection.advantage_rule", ("rewards",))
    metric = read_function(f"{file}:metric", "record.metric", ("rollouts", "verdicts"))
    rule([1.0])
    assert metric([], []) == {"seen": 1}
    file.write_text(f"{text}    return {{'seen': -1}}\n")
    assert read_function("own.py:metric", "record.metric", ("rollouts", "verdicts"))([], []) == {"seen": -1}
