"""T1's recipes: the paper's numbers, layouts that fit models and GPUs, and what its parts cost in the plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from oreal_megatron import settings
from oreal_megatron.config import Config, ConfigError, ReferenceConfig, validate
from oreal_megatron.models import architecture
from oreal_megatron.plan import assumptions, gpus, memory, published, timing
from oreal_megatron.plan.scenario import Scenario
from oreal_megatron.session import model_checks

FILE = Path(__file__).parent.parent.parent / "examples/recipes/t1.py"
GPUS = {"t1_9b": 16, "t1_14b": 32, "t1_32b": 64}


def scenario_of(config: Config) -> Scenario:
    arch = architecture.read(published.read_config(config.model.path)[0])
    return Scenario(config, arch, gpus.find_gpu("h100-80g"), config.gpus, 8, assumptions.with_changes([]))


def test_all_recipes_are_listed_here():
    with pytest.raises(ConfigError) as error:
        settings.from_recipe(f"{FILE}:?")
    assert set(str(error.value).split("known are ")[1].split(", ")) == set(GPUS)


@pytest.mark.parametrize("name", GPUS)
def test_numbers_and_layout(name, monkeypatch):
    for variable in ("OREAL_MODELS", "OREAL_DATA", "OREAL_RUNS"):
        monkeypatch.delenv(variable, raising=False)
    config = settings.from_recipe(f"{FILE}:{name}")
    validate(config)
    assert config.gpus == GPUS[name] and not config.reward_model.enabled
    assert (config.data.prompts_per_step, config.sampling.rollouts_per_prompt, config.sampling.temperature) == (
        32,
        64,
        1.2,
    )
    assert config.engine.max_model_len == (16384 if "32b" in name else 10240) and config.optimizer.lr == 1.5e-6
    assert config.selection.penalties.enabled and config.selection.keep == "all"
    # Rewards are twice as far apart as the paper's 1 and 0: with half of each side, coefficients are the paper's.
    assert config.loss.positive_coef == config.loss.negative_coef == 0.5 and config.loss.normalise == "joint"
    assert config.loss.positive_coef * config.loss.reward_kl_coef == 2e-4 and config.loss.kl_coef == 0
    assert config.reference.moves and config.data.buckets == ((0.0, 0.31, 1),)
    scenario = scenario_of(config)
    monkeypatch.setenv("WORLD_SIZE", str(config.gpus))
    scenario.arch.check_layout(config.parallel.tensor, config.parallel.pipeline)
    model_checks.check_world(config, scenario.arch)
    model_checks.check_kv_cache(config, scenario.arch)
    assert config.engine.max_num_seqs * scenario.replicas == 32 * 64
    assert all(stage.peak < scenario.usable for stage in memory.stages(scenario))


def test_the_plan_counts_the_average_of_a_moving_reference_and_the_pass_for_kl_in_the_reward():
    config = settings.from_recipe(f"{FILE}:t1_14b")
    changes = {"fixed": ReferenceConfig(), "copied": ReferenceConfig(0.0), "average": ReferenceConfig(0.99)}
    scenarios = {name: scenario_of(dataclasses.replace(config, reference=value)) for name, value in changes.items()}
    elements = scenarios["fixed"].elements(0, "lm")
    sizes = {name: memory.reference_bytes(scenario, 0) / elements for name, scenario in scenarios.items()}
    assert sizes == {"fixed": 2, "copied": 2, "average": 6}
    written = {name: timing.checkpoint(scenario)[0] for name, scenario in scenarios.items()}
    every = scenarios["fixed"].all_elements("lm")
    assert written["copied"] - written["fixed"] == 2 * every and written["average"] - written["fixed"] == 4 * every
    host = {name: memory.host_bytes(scenario)["idle models"] for name, scenario in scenarios.items()}
    assert host["average"] > host["copied"] == host["fixed"]
    plain = dataclasses.replace(config, loss=dataclasses.replace(config.loss, reward_kl_coef=0.0))
    seconds = [timing.phases(s, timing.transfer(s))["policy"] for s in (scenario_of(plain), scenarios["average"])]
    assert seconds[1] > 1.1 * seconds[0]


ARMS = {  # arm -> settings in which it differs from the first
    "rollouts_4": {"sampling"}, "rollouts_64": {"sampling"}, "temperature_09": {"sampling"},
    "temperature_10": {"sampling"}, "temperature_14": {"sampling"}, "without_penalties": {"selection"},
    "without_entropy_bonus": {"loss"}, "fixed_reference": {"reference"},
}  # fmt: skip


def test_each_arm_of_the_ablation_changes_one_section_and_is_evaluated_alike():
    script = FILE.parent.parent.joinpath("t1_ablation.sh").read_text()
    listed = [name for line in script.splitlines() if line.startswith("arms=") for name in line[5:].split(",")]
    assert [name for name in listed if name != "$arms"] == ["rollouts_16", *ARMS]
    recipe = FILE.with_name("t1_checked.py")
    first = settings.from_recipe(f"{recipe}:rollouts_16")
    for name, sections in ARMS.items():
        config = settings.from_recipe(f"{recipe}:{name}")
        validate(config)
        fields = [field.name for field in dataclasses.fields(config)]
        assert {field for field in fields if getattr(config, field) != getattr(first, field)} == sections
    assert first.evaluation.temperature == 1.0 and first.sampling.temperature == 1.2


def test_the_small_recipes_are_valid_and_have_every_part(monkeypatch):
    monkeypatch.setenv("OREAL_T1_FOLDER", "folder")  # examples/t1.sh names one folder for both files
    monkeypatch.setenv("OREAL_CHECKED_FOLDER", "folder")
    recipe = FILE.with_name("t1_checked.py")
    recipes = {name: settings.from_recipe(f"{recipe}:{name}") for name in ("reinforce", "rate", "rft")}
    recipes["sft"] = settings.from_recipe(f"{FILE.with_name('checked.py')}:sft_care")
    for config in recipes.values():
        validate(config)
    config = recipes["reinforce"]
    assert config.loss.entropy_coef and config.loss.reward_kl_coef and config.reference.moves
    assert config.selection.penalties.enabled and config.sampling.min_p and config.sampling.temperature == 1.2
    folders = {name: recipe.run for name, recipe in recipes.items()}
    assert config.model.path == f"{folders['rft']}/policy"
    assert recipes["rft"].model.path == recipes["rate"].model.path == f"{folders['sft']}/policy"
