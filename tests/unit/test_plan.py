"""`oreal plan`: counts that are known from elsewhere, directions, what the command says and how it ends."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import pytest

from oreal_megatron import settings
from oreal_megatron.algo import packing
from oreal_megatron.cli.main import main, parser
from oreal_megatron.config import (
    Config,
    ConfigError,
    DistillationConfig,
    ModelConfig,
    ParallelConfig,
    SupervisedConfig,
)
from oreal_megatron.config.schema import config_keys
from oreal_megatron.models import architecture, flops
from oreal_megatron.plan import activations, assumptions, estimate, gpus, memory, published, search, synthetic, timing
from oreal_megatron.plan.estimate import GIB
from oreal_megatron.plan.scenario import Scenario
from oreal_megatron.records import PackingSpec

RECIPES = Path(__file__).parent.parent.parent / "examples/recipes/oreal.py"
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
EVERY = [line.split("(")[0][4:] for line in RECIPES.read_text().splitlines() if line.startswith("def oreal_")]


def case(recipe: str = "oreal_7b", *changes: str, gpu: str = "h100-80g", world: int = 0) -> Scenario:
    config = settings.override(settings.from_recipe(f"{RECIPES}:{recipe}"), list(changes))
    arch = architecture.read(published.read_config(config.model.path)[0])
    return Scenario(config, arch, gpus.find_gpu(gpu), world or config.gpus)


def test_published_models_have_as_many_parameters_as_their_cards_say():
    assert case("oreal_7b").all_elements("lm") == 7_615_616_512  # of Qwen2.5-7B, model.safetensors.index.json
    assert case("oreal_32b").all_elements("lm") == 32_763_876_352  # of Qwen2.5-32B


def test_a_cached_token_of_7b_takes_56_kib():
    assert (
        case("oreal_7b", "engine.tensor=1").cache_token() == 56 * 1024
    )  # 28 layers, 4 groups of 128, keys and values, bf16
    assert case("oreal_7b", "engine.tensor=2").cache_token() == 28 * 1024


@pytest.mark.parametrize(("keep", "samples"), [("pair", 64 * 0.6 * 2), ("mixed", 64 * 0.6 * 16), ("all", 64 * 16)])
def test_a_step_trains_on_the_samples_that_the_selection_keeps(keep, samples):
    assert case("oreal_7b", f"selection.keep={keep}").sequences == pytest.approx(samples)


@pytest.mark.parametrize("changes", [("parallel.tensor=2",), ("parallel.pipeline=4",), ("parallel.context=2",)])
def test_however_it_is_cut_all_ranks_together_hold_the_model(changes):
    """Norms, which tensor-parallel ranks repeat, are the only difference."""
    one = case("oreal_7b", *changes)
    cut = one.config.parallel
    together = sum(one.elements(stage, "lm") for stage in range(cut.pipeline)) * cut.tensor
    repeated = (2 * one.arch.layers + 1) * one.arch.hidden * (cut.tensor - 1)
    assert together - repeated == one.all_elements("lm")
    states = [memory.model_bytes(one, stage, "lm")["optimizer"] for stage in range(cut.pipeline)]
    assert sum(states) * one.world / cut.pipeline == pytest.approx(12 * together)


def test_activations_shrink_with_every_way_of_cutting_and_with_recomputation():
    def kept(*changes: str, megatron: dict = FULL) -> float:
        one = case("oreal_7b", "parallel.tensor=1", "parallel.sequence=false", *changes)
        config = dataclasses.replace(one.config, megatron=megatron)
        return activations.saved_bytes(one.arch, config, 0, 16384, 8)

    selective = {"recompute_granularity": "selective"}
    block = [kept(megatron=FULL | {"recompute_method": "block", "recompute_num_layers": n}) for n in (1, 14, 28)]
    assert kept(megatron={}) > block[0] > block[1] > block[2] >= kept()
    assert kept(megatron=selective) < 1.05 * kept(megatron={})  # it trades no memory for lengths, with flash attention
    tensor = kept("parallel.tensor=4")
    assert kept() > tensor > kept("parallel.tensor=4", "parallel.sequence=true")
    assert kept() > kept("parallel.context=2") > 0.45 * kept()
    one_f_one_b = case("oreal_7b", "parallel.pipeline=4")
    flight = [activations.in_flight(one_f_one_b.config.parallel, stage, 8) for stage in range(4)]
    assert flight == [4, 3, 2, 1] and activations.in_flight(one_f_one_b.config.parallel, 0, 2) == 2


@pytest.mark.parametrize("recipe", EVERY)
@pytest.mark.parametrize("gpu", ["h100-80g", "a100-80g"])
def test_every_recipe_fits_the_gpus_it_was_made_for(recipe, gpu):
    one = case(recipe, gpu=gpu)
    one.check()
    assert memory.largest_cache(one, memory.stages(one)) >= one.config.engine.kv_cache_gib * GIB
    assert all(stage.peak < one.usable for stage in memory.stages(one))


def test_the_largest_cache_is_the_largest():
    stages = memory.stages(case())
    most = memory.largest_cache(case(), stages) / GIB
    for size, fits in ((most - 0.01, True), (most + 0.01, False)):
        made = estimate.estimate_scenario(case("oreal_7b", f"engine.kv_cache_gib={size}"), search.NO_TRANSFER)
        assert made.fits is fits and any("engine.kv_cache_gib=" in sentence for sentence in estimate.warnings(made))


def test_without_offloading_or_sleep_everything_is_there_at_once():
    def phase(*changes: str) -> memory.Bytes:
        return memory.stages(case("oreal_7b", *changes))[0].phases["policy"]

    away, here = phase(), phase("offload=false")
    assert here["gradients"] == pytest.approx(2 * away["gradients"], rel=0.1) and not here["KV cache"]
    assert phase("engine.sleep=false")["KV cache"] == 48 * GIB


def test_models_are_built_and_saved_beside_a_sleeping_engine_and_saved_without_gradients():
    one = case("oreal_7b")
    phases, policy = memory.stages(one)[0].phases, memory.model_bytes(one, 0, "lm")
    build, save = phases["build"], phases["save"]
    trained = ("parameters", "gradients", "optimizer")
    assert not build["KV cache"] and [build[part] for part in trained] == [policy[part] for part in trained]
    assert policy["parameters"] > policy["optimizer"], "of eight replicas: what they are copied from weighs more"
    resident = one.assumed.asleep_gib * GIB
    assert build["buffers"] - resident + policy["optimizer"] == pytest.approx(policy["parameters"])
    assert not save["KV cache"] and [save[part] for part in trained] == [
        policy["parameters"], 0, policy["optimizer"]
    ]  # fmt: skip
    kept = memory.stages(case("oreal_7b", "offload=false"))[0].phases["save"]
    assert kept["gradients"] > policy["gradients"]
    awake = memory.stages(case("oreal_7b", "engine.sleep=false"))[0].phases
    assert awake["build"]["KV cache"] == awake["save"]["KV cache"] == 48 * GIB


def test_a_sleeping_engine_keeps_what_is_neither_weights_nor_cache():
    """Of every phase in which it sleeps, and of none in which it is awake: that has all that it needs."""
    one = case("oreal_7b")
    less = dataclasses.replace(one, assumed=assumptions.Assumptions(asleep_gib=0))
    phases, without = memory.stages(one)[0].phases, memory.stages(less)[0].phases
    more = {name: memory.total() - without[name].total() for name, memory in phases.items()}
    asleep = ("build", "reward_model", "reference", "policy", "save")
    assert more == pytest.approx({name: 1.5 * GIB if name in asleep else 0.0 for name in phases})
    assert not phases["policy"]["engine weights"] and not phases["policy"]["KV cache"]


def test_loading_a_checkpoint_takes_a_shard_of_float32_state_on_every_data_parallel_rank():
    """Megatron's memory-efficient saving does not help here: one TP shard with both moments, on all eight ranks."""
    one = case("oreal_7b_8_gpus")
    host = memory.host_bytes(one)
    assert host["loading a checkpoint"] == pytest.approx(8 * 12 * one.elements(0, "lm"))
    assert memory.host_peak(host) == host["idle models"] + host["gathering a checkpoint"]
    unsplit = memory.host_bytes(case("oreal_7b_8_gpus", "parallel.tensor=1", "parallel.sequence=false"))
    assert memory.host_peak(unsplit) == unsplit["idle models"] + unsplit["loading a checkpoint"]


def test_proving_fetches_the_weights_and_scores_a_few_tokens():
    one = case("oreal_7b")
    moved = timing.Transfer(0, 0, 0, "direct")
    fetched = memory.model_bytes(one, 0, "lm")["parameters"] / 25e9  # only read: nothing is copied back
    shorter = timing.phases(one, moved)["parity"]
    assert fetched < shorter < 1.5 * fetched, "2 answers of each replica, 64 tokens of each"
    assert timing.phases(case("oreal_7b", "engine.parity_tokens=128"), moved)["parity"] > shorter
    kept = timing.phases(case("oreal_7b", "offload=false"), moved)["parity"]
    assert kept == pytest.approx(shorter - fetched)


def test_times_point_the_right_way():
    def seconds(*changes: str, **others) -> dict[str, float]:
        one = case("oreal_32b", *changes, **others)
        return timing.phases(one, timing.Transfer(16e9, 4e9, 500e9, "direct"))

    base = seconds()
    assert seconds(gpu="a100-80g")["policy"] > 2 * base["policy"]
    assert seconds(gpu="h200")["generate"] < base["generate"]
    assert seconds("engine.tensor=4")["generate"] > base["generate"]
    assert seconds(world=64)["policy"] > 1.5 * base["policy"]
    assert base["reference"] < base["policy"] / 2, "one pass against four"


def test_an_update_costs_a_reduction_a_pass_all_computing_and_a_mini_batch_a_bubble():
    def policy(updates: int, mini_batches: int, *changes: str) -> float:
        changes = (*changes, f"loss.updates_per_step={updates}", f"loss.mini_batches={mini_batches}", "offload=false")
        return timing.phases(case("oreal_32b", *changes), timing.Transfer(0, 0, 0, "direct"))["policy"]

    one = case("oreal_32b", "offload=false")
    reducing, once = timing.gradients(one), policy(1, 1)
    assert reducing > 0 and policy(3, 1) == pytest.approx(3 * once)
    flat = ("parallel.pipeline=1", "parallel.virtual=1")
    one_stage = case("oreal_32b", "offload=false", *flat)
    assert policy(4, 4, *flat) == pytest.approx(policy(1, 1, *flat) + 3 * timing.gradients(one_stage))
    staged = ("parallel.pipeline=4",)
    piped = case("oreal_32b", "offload=false", *staged)
    assert policy(2, 2, *staged) > policy(1, 1, *staged) + timing.gradients(piped), "each fills the pipeline again"
    term = ("loss.term=own.py:term",)
    scoring = timing.training(one, 1)
    assert policy(2, 1, *term) == pytest.approx(2 * once), "the first update has the old log-probs"
    assert policy(2, 2, *term) == pytest.approx(policy(2, 2) + scoring)


def test_decoding_reads_weights_every_step_and_the_cache_for_every_token():
    """7B on one H100 with a whole replica's 128 answers, by hand."""
    alone = ("engine.tensor=1", "engine.max_num_seqs=128")
    made = timing.generation(case("oreal_7b_8_gpus", *alone))
    bandwidth, weights = 0.6 * 3.35e12, 2 * 7_615_616_512
    by_hand = 14000 * (weights / bandwidth + 0.004) + 128 * 5000 * (400 + 2500) * 57344 / bandwidth
    assert made.decode == pytest.approx(by_hand, rel=1e-3) and made.bound == "the longest response"
    few = timing.generation(case("oreal_7b_8_gpus", *alone, "engine.kv_cache_gib=4"))
    assert few.concurrent == pytest.approx(4 * GIB / 57344 / 2900) and few.bound == "26 concurrent responses"
    assert few.decode - made.decode == pytest.approx(
        (128 * 5000 / few.concurrent - 14000) * (weights / bandwidth + 0.004), rel=1e-2
    )


@pytest.mark.parametrize(("recipe", "received", "between"), [("oreal_32b", 61.44, 32.77), ("oreal_7b", 11.42, 0)])
def test_gathering_brings_every_rank_what_it_does_not_hold(recipe, received, between):
    """GB of docs/concepts/resharding.md: of 32B a shard comes from 7 ranks, and another machine's stage whole."""
    moved = timing.transfer(case(recipe, "engine.transport=gather"))
    assert (round(moved.received / 1e9, 2), round(moved.received_between / 1e9, 2)) == (received, between)


def test_time_is_lost_by_bubbles_exchanges_and_recomputation():
    two, four = case("oreal_32b"), case("oreal_32b", "parallel.pipeline=4")
    assert timing.bubble(case("oreal_7b")) == 0 and timing.bubble(two) == 1 / (two.micro_batches + 1)
    parts = case("oreal_32b", "loss.updates_per_step=2", "loss.mini_batches=2", "loss.negative_coef=0")
    assert timing.bubble(parts) == pytest.approx(10 / 7 / (two.micro_batches + 10 / 7)), "two fills of the policy's"
    lost = [timing.training(one, 4) * (1 - timing.bubble(one)) for one in (two, four)]
    assert lost[0] == pytest.approx(lost[1]) and timing.training(two, 4) < timing.training(four, 4)
    free = dataclasses.replace(two, assumed=assumptions.Assumptions(all_reduce_us=0))
    assert timing.step_overhead(free) == pytest.approx(timing.step_overhead(two) - 128 * 15e-6)
    kept = dataclasses.replace(two, config=dataclasses.replace(two.config, megatron={}, offload=False))
    again = dataclasses.replace(two, config=dataclasses.replace(two.config, offload=False))
    moved = timing.Transfer(0, 0, 0, "direct")
    difference = timing.phases(again, moved)["policy"] - timing.phases(kept, moved)["policy"]
    assert difference == pytest.approx(timing.training(two, 1))


def test_an_update_takes_six_operations_a_parameter_and_token():
    one = case("oreal_7b")
    short = dataclasses.replace(one, assumed=assumptions.Assumptions(prompt_tokens=1, response_tokens=1))
    matrices = flops.matrix_elements(one.arch)
    seconds = short.sequences * 2 * 6 * matrices / (0.4 * 989e12 * 32)
    assert timing.training(short, 3) - timing.exchanges(short) * 3 == pytest.approx(seconds, rel=1e-3)
    assert matrices == pytest.approx(7_615_616_512 - 152064 * 3584, rel=1e-4)


def test_planned_speed_counts_prompts_as_the_speed_report_does():
    made = estimate.estimate_scenario(case(), search.NO_TRANSFER)
    assert made.tokens_per_gpu_second * made.step_seconds * 32 == pytest.approx(64 * 16 * (400 + 5000))


def test_the_search_is_sorted_fits_and_beats_the_recipe():
    one = case("oreal_7b", world=16)
    found = search.best_layouts(one, 4)
    assert len(found) == 4 and all(made.spare > 0.04 * one.usable for made in found)
    assert [search.rank(made) for made in found] == sorted(map(search.rank, found))
    assert found[0].step_seconds < 1.05 * estimate.estimate_scenario(one).step_seconds
    printed = [search.printed_seconds(made) for made in found]
    assert printed[0] <= min(map(search.printed_seconds, filter(lambda made: made.fits_host, search._fitting(one)))) + 1
    assert len({(made.scenario.config.parallel, made.scenario.config.engine.tensor, made.scenario.config.offload,
                 str(made.scenario.config.megatron)) for made in found}) == 4  # fmt: skip
    assert search.best_layouts(dataclasses.replace(case("oreal_32b"), gpu=gpus.find_gpu("a100-40g"), world=8)) == []


@pytest.mark.parametrize("recipe", ["oreal_7b_8_gpus", "oreal_32b"])
def test_a_recipe_is_as_fast_as_the_best_layout(recipe):
    one = case(recipe)
    best = min(made.step_seconds for made in search._fitting(one))
    assert estimate.estimate_scenario(one, search.NO_TRANSFER).step_seconds < 1.05 * best


def test_a_synthetic_step_has_the_assumed_lengths_and_ranks_of_every_group():
    one = case("oreal_32b")
    samples = synthetic.samples(one)
    mean = sum(len(sample.response_tokens) for sample in samples) / len(samples)
    assert len(samples) == 77 and abs(mean / one.assumed.response_tokens - 1) < 0.1
    assert max(map(len, samples)) <= one.config.engine.max_model_len
    ranks = synthetic.default_ranks(one)
    assert ranks == [0, 1, 8, 63, 64, 127]
    spots = {(rank % 8, rank // 8 % 8, rank // 64) for rank in ranks}
    for axis in range(3):  # two ranks that differ along one way of cutting only
        assert any(
            sum(a != b for a, b in zip(one, two, strict=True)) == 1 and one[axis] != two[axis]
            for one, two in itertools.combinations(spots, 2)
        )
    few = case("oreal_7b_8_gpus")
    packed = packing.batch(synthetic.samples(few), PackingSpec(few.config.tokens_per_micro_batch, 0, few.data))
    assert few.micro_batches == 13 and len(packed.micro_batches) in (4, 5), "enough for a pipeline, not a whole step"
    assert synthetic.one_replica(one) == [*range(8), *range(64, 72)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["parallel.tensor=3", "parallel.sequence=true"], "28 attention heads cannot be split evenly over 3"),
        (["parallel.pipeline=3"], "28 layers cannot be split evenly over 3"),
        (["engine.tensor=8"], "engine.tensor is 8, which does not divide 28"),
        (["engine.tensor=1", "engine.kv_cache_gib=0.5"], "one sequence of 16384 tokens needs 0.88"),
        (["engine.max_model_len=40000"], "32768 positions"),
        (["parallel.context=3"], "tensor x pipeline x context is 12, which does not divide 32 GPUs"),
        (["parallel.tensor=1"], "parallel.sequence is set"),
        (["model.path=models/unheard"], "'unheard' is not a published model"),
        (["verify.workers=0"], "verify.workers is 0; expected 1 to 1024 (verifier processes"),
        (["megatron.recompute_granularitty=full"], "TransformerConfig has no field 'recompute_granularitty'; did you"),
        (["megatron.num_layers_in_first_pipeline_stage=1"], "equally many layers on every pipeline stage; remove it"),
        (["megatron.num_layers=3"], "config.megatron: num_layers is derived from the model and the other sections"),
        (["megatron.expert_model_parallel_size=2"], "expert parallelism is not supported"),
        (
            ["megatron.recompute_granularity=some"],
            "megatron.recompute_granularity is 'some'; expected full | selective",
        ),
        (["megatron.recompute_num_layers='1'"], "megatron.recompute_num_layers is '1'; expected int | None"),
        (["megatron.recompute_granularity=full"], "megatron-core refuses this configuration: "),
    ],
)
def test_a_layout_that_cannot_be_is_told_in_a_sentence(changes, says, capsys):
    arguments = [word for change in changes for word in ("--set", change)]
    assert main(["plan", f"{RECIPES}:oreal_7b", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "h1000"], "unknown GPU h1000; choose one of a100-40g"),
        (["--assume", "train_mfv=1"], "did you mean train_mfu?"),
        (["--assume", "train_mfu=fast"], "'fast' is not a number"),
        (["--assume", "train_mfu=0"], "--assume train_mfu is 0; expected 0.001 to 1 (of the bf16 peak"),
        (["--assume", "response_tokens=nan"], "--assume response_tokens is nan; expected a finite number, 1 to"),
        (["--assume", "response_tokens=-5", "link_share=0"], "--assume link_share is 0; expected 0.001 to 1"),
        (["--gpus", "12"], "12 GPUs is not a multiple of 8 GPUs per node"),
    ],
)
def test_a_wrong_argument_is_told_in_a_sentence(arguments, says, capsys):
    assert main(["plan", f"{RECIPES}:oreal_7b", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(assumptions.Assumptions)])
def test_an_assumption_within_its_bounds_gives_a_plan_and_no_other_is_taken(field):
    one = case("oreal_7b")
    (key,) = (key.key for key in config_keys(assumptions.Assumptions()) if key.path == field)
    for value in (key.low, key.high):
        plan = estimate.estimate_recipe(
            dataclasses.replace(one, assumed=assumptions.with_changes([f"{field}={value}"]))
        )
        assert all(map(math.isfinite, (plan.step_seconds, plan.hours))) and plan.step_seconds > 0
    for value in (key.low - 1, key.high * 2, "inf", "-inf", "nan"):
        with pytest.raises(ConfigError, match=f"--assume {field} is "):
            assumptions.with_changes([f"{field}={value}"])


def test_several_assumptions_follow_one_option():
    words = ["plan", "r.py", "--assume", "prompt_tokens=10", "response_tokens=20", "--gpus", "8", "--assume", "thin=0"]
    assert parser("plan").parse_args(words).assume == ["prompt_tokens=10", "response_tokens=20", "thin=0"]


def test_the_command_prints_and_writes_the_plan(capsys, tmp_path):
    files = ["--json", str(tmp_path / "plan.json"), "--picture", str(tmp_path / "plan.png")]
    assert main(["plan", f"{RECIPES}:oreal_32b", *files]) == 0
    said = capsys.readouterr().out
    for words in (
        "does not exist here; planned",
        "build",
        "save",
        "train_mfu 0.4",
        "rank receives 4.10",
        "90 steps take",
        "it fits",
    ):
        assert words in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["fits"] and len(written["memory_bytes"]) == 2 and written["transfer_bytes"]["received_between"] > 4e9
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_where_the_layout_cannot_be_the_search_says_which_can(capsys):
    assert main(["plan", f"{RECIPES}:oreal_7b", "--gpus", "2", "--gpu", "h200", "--search"]) == 2
    said = capsys.readouterr()
    assert "which does not divide 2 GPUs" in said.err
    assert "layouts, best first" in said.out and "pipeline 1, data" in said.out and "--set parallel." in said.out
    lines = [line for line in said.out.splitlines() if not re.match(r"\d\. ", line)]  # those are to be copied
    assert max(map(len, lines)) <= 80


def test_what_does_not_fit_ends_with_its_own_code(capsys):
    assert main(["plan", f"{RECIPES}:oreal_7b", "--gpu", "a100-40g"]) == 6
    said = capsys.readouterr().out
    assert "it does not fit" in said and "GiB too much; engine.kv_cache_gib=" in " ".join(said.split())


def test_a_mixture_is_planned_but_not_rehearsed(tmp_path, capsys):
    hf = json.loads((RECIPES.parent.parent.parent / "tests/families.json").read_text())["Qwen3Moe"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from oreal_megatron.config import Config, EngineConfig, ModelConfig\n"
        f"def small():\n    model = ModelConfig({str(tmp_path)!r})\n"
        "    return Config(gpus=2, model=model, engine=EngineConfig(max_model_len=64))\n"
    )
    assert main(["plan", f"{recipe}:small"]) == 0
    assert "weight sync (gather)" in capsys.readouterr().out
    assert main(["plan", f"{recipe}:small", "--rehearse"]) == 2
    assert "depends on data" in capsys.readouterr().err


def test_a_model_folder_that_is_there_is_read(model_folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from oreal_megatron.config import Config, EngineConfig, ModelConfig\n"
        f"def small(): return Config(model=ModelConfig({str(model_folder)!r}), engine=EngineConfig(max_model_len=64))\n"
    )
    with pytest.raises(ConfigError, match="published"):
        published.read_config("somewhere/else")
    assert main(["plan", f"{recipe}:small"]) == 2
    assert "does not say how many GPUs" in capsys.readouterr().err
    assert main(["plan", f"{recipe}:small", "--gpus", "1"]) == 0
    assert "does not exist here" not in capsys.readouterr().out


@pytest.mark.parametrize("host_gib", [100, 300, 2000])
def test_layouts_are_printed_in_the_order_of_what_is_printed_and_those_beyond_the_host_come_last(
    host_gib, capsys, monkeypatch
):
    def transfer(scenario: Scenario) -> timing.Transfer:  # slow for real; this one turns the order around
        size = 40e9 / scenario.config.parallel.tensor * scenario.config.parallel.pipeline
        return timing.Transfer(size, size, size, "direct")

    monkeypatch.setattr(timing, "transfer", transfer)
    arguments = ["--search", "--assume", f"host_gib={host_gib}", "--gpus", "16"]
    assert main(["plan", f"{RECIPES}:oreal_7b", *arguments]) in (0, 6)
    lines = capsys.readouterr().out.split("layouts, best first")[1].splitlines()[1:]
    entries, recipe = [], settings.from_recipe(f"{RECIPES}:oreal_7b")
    for line in lines:
        if re.match(r"\d\. ", line):
            entries.append([float(re.search(r": ([\d.]+) s/step", line)[1]), False])
            options = re.search(r"((--set \S+ ?)+)$", line.rstrip())
            assert options, f"no settings to copy at the end of {line}"
            chosen = settings.override(recipe, [word for word in options[1].split() if word != "--set"])
            assert f"tensor {chosen.parallel.tensor}" in line and f"pipeline {chosen.parallel.pipeline}" in line
            assert f"KV cache {chosen.engine.kv_cache_gib:.0f} GiB" in line
        elif "does not fit the host" in line:
            entries[-1][1] = True
    assert [number for number, _ in enumerate(entries, 1)] == list(range(1, len(entries) + 1)) and len(entries) == 5
    keys = [(beyond, seconds) for seconds, beyond in entries]
    assert keys == sorted(keys), "host first, then seconds"
    assert any(beyond for beyond, _ in keys) == (host_gib < 200)


@pytest.mark.parametrize(
    ("changes", "world"),
    [
        (("engine.kv_cache_gib=70",), 0), (("engine.kv_cache_gib=70", "offload=false"), 0), (("offload=false",), 0),
        (("megatron.recompute_granularity=None", "parallel.tensor=1", "parallel.sequence=false"), 0),
        (("engine.tensor=4", "parallel.pipeline=7"), 56), (("tokens_per_micro_batch=65536",), 0),
        (("parallel.tensor=1", "parallel.sequence=false", "offload=false"), 8),
    ],
)  # fmt: skip
def test_every_warning_names_a_setting(changes, world):
    keys = [key.path for key in config_keys(Config())] + ["--gpus", "--assume", "megatron.recompute_granularity"]
    one = dataclasses.replace(case("oreal_7b", *changes, world=world), assumed=assumptions.Assumptions(host_gib=50))
    messages = list(estimate.warnings(estimate.estimate_scenario(one, search.NO_TRANSFER)))
    assert messages and all(any(key in message for key in keys) for message in messages), messages


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("objective", ["pearson", "kl_logits"])
def test_a_teacher_adds_its_parameters_and_features_to_two_phases_and_to_no_other(offload, objective):
    section = DistillationConfig(teacher="models/Qwen2.5-32B", objective=objective, layers=2)
    config = Config(
        model=ModelConfig("models/Qwen2.5-7B", "bfloat16"), parallel=ParallelConfig(tensor=4), offload=offload,
        distillation=section, supervised=SupervisedConfig(samples_per_step=16),
    )  # fmt: skip
    student = architecture.read(published.read_config(config.model.path)[0])
    teacher = published.read_teacher(config)
    alone = Scenario(config, student, gpus.find_gpu("h100-80g"), 4)
    (plain,), (taught,) = memory.stages(alone), memory.stages(dataclasses.replace(alone, teacher=teacher))
    assert {name: taught.phases[name] for name in plain.phases} == plain.phases
    assert set(taught.phases) - set(plain.phases) == {"teacher", "distillation"}
    own = 2 * alone.elements(0, "lm")
    weights = 2 * dataclasses.replace(alone, arch=teacher).elements(0, "lm")
    expected = (
        {"teacher": weights, "distillation": own}
        if offload
        else dict.fromkeys(("teacher", "distillation"), own + weights)
    )
    assert {name: taught.phases[name]["parameters"] for name in expected} == expected
    width = teacher.vocab / 4 if objective == "kl_logits" else 2 * teacher.hidden
    stored = taught.phases["distillation"]["activations"] - plain.phases["policy"]["activations"]
    assert stored == pytest.approx(2 * 16 * alone.sequence_tokens * width)
    assert published.read_teacher(dataclasses.replace(config, distillation=DistillationConfig())) is None


@pytest.mark.parametrize("objective", ["pearson", "kl_logits"])
def test_a_teacher_adds_its_forward_pass_and_the_student_s_statistics(objective):
    """Against the operations of both models, counted here; kl_logits needs no statistics."""
    section = DistillationConfig(teacher="models/Qwen2.5-32B", objective=objective)
    config = Config(
        model=ModelConfig("models/Qwen2.5-7B", "bfloat16"), offload=False,
        distillation=section, supervised=SupervisedConfig(samples_per_step=48),
    )  # fmt: skip
    student, teacher = architecture.read(published.read_config(config.model.path)[0]), published.read_teacher(config)
    one = Scenario(config, student, gpus.find_gpu("h100-80g"), 1, teacher=teacher)
    seconds = timing.distillation(one)
    length, rate = one.sequence_tokens, one.gpu.flops * one.assumed.train_mfu
    small, large = (48 * flops.forward(arch, [length], length) / rate for arch in (student, teacher))
    passes = {"teacher": large, "statistics": small, "policy": 3 * small}
    if objective == "kl_logits":
        del passes["statistics"]
    assert seconds == pytest.approx(passes) and list(seconds) == list(passes)
    assert timing.distillation(dataclasses.replace(one, teacher=None)) == {}
    offloaded = dataclasses.replace(one, config=dataclasses.replace(config, offload=True))
    loaded = 2 * dataclasses.replace(one, arch=teacher).elements(0, "lm")
    difference = timing.distillation(offloaded)["teacher"] - seconds["teacher"]
    assert difference == pytest.approx(loaded / (one.assumed.pcie_gb_s * 1e9))


def test_projections_are_trained_beside_the_student():
    section = DistillationConfig(teacher="models/Qwen2.5-32B", layers=2)
    config = Config(model=ModelConfig("models/Qwen2.5-7B", "bfloat16"), parallel=ParallelConfig(tensor=4))
    student = architecture.read(published.read_config(config.model.path)[0])

    def parts(**changes) -> memory.Bytes:
        changed = dataclasses.replace(config, distillation=dataclasses.replace(section, **changes))
        one = Scenario(changed, student, gpus.find_gpu("h100-80g"), 8, teacher=published.read_teacher(changed))
        return memory.stages(one)[0].phases["distillation"]

    elements = 2 * 3584 * 5120
    added = parts(projection=True) - parts()
    assert added == {"parameters": 2 * elements, "gradients": 4 * elements, "optimizer": 6 * elements}


def test_the_perplexity_penalty_scores_every_rollout_with_the_reference():
    plain, penalised = case("oreal_7b"), case("oreal_7b", "selection.penalties.perplexity=50")
    moved = timing.Transfer(0, 0, 0, "direct")
    before, after = timing.phases(plain, moved), timing.phases(penalised, moved)
    rollouts = plain.config.data.prompts_per_step * plain.config.sampling.rollouts_per_prompt
    swapping = timing.swap(plain, "reference")
    scored = (before["reference"] - swapping) * rollouts / plain.sequences
    assert after == pytest.approx(before | {"perplexity": scored + swapping}) and rollouts > plain.sequences


def test_the_command_prints_the_time_of_a_teacher(tmp_path, capsys):
    changes = "distillation.teacher=models/Qwen2.5-32B", "supervised.samples_per_step=48"
    arguments = ["plan", "examples/recipes/oreal.py:oreal_7b", "--json", str(tmp_path / "plan.json")]
    main([*arguments, *(part for change in changes for part in ("--set", change))])
    seconds = json.loads((tmp_path / "plan.json").read_text())["distillation_seconds"]
    assert f"oreal distill: {sum(seconds.values()):.1f} s per step" in capsys.readouterr().out
    assert list(seconds) == ["teacher", "statistics", "policy"] and min(seconds.values()) > 0
