"""The speed report: operations by hand and by torch's own counter, shares of planted times, the table of known rows."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from oreal_megatron import config as c
from oreal_megatron.algo import packing
from oreal_megatron.cli.main import main
from oreal_megatron.models import architecture, flops
from oreal_megatron.observe import run_report, speed, speed_report
from oreal_megatron.observe.phase_timer import PhaseTimer
from oreal_megatron.plan import gpus
from oreal_megatron.records import PackingSpec, Prompt, Rollout, Sample
from oreal_megatron.runtime import heartbeat

ROWS = json.loads((Path(__file__).parent.parent / "families.json").read_text())
TINY = dict(ROWS["Qwen2"], num_hidden_layers=2, hidden_size=8, intermediate_size=16, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4, vocab_size=32)  # fmt: skip
LAYERS = 2 * (64 + 64 + 2 * 32 + 3 * 8 * 16)  # queries, output, keys and values, gated block


def tiny() -> architecture.Architecture:
    return architecture.read(TINY)


def test_operations_of_a_tiny_model_by_hand():
    assert flops.layer_elements(tiny()) == LAYERS == 1152
    squares = 4 * 2 * 2 * 4 * (3 * 3 + 5 * 5) / 2  # scores and sums, layers, heads, their size, half of each square
    assert flops.forward(tiny(), [3, 5], 4) == 2 * LAYERS * 8 + 2 * 8 * 32 * 4 + squares
    assert flops.forward(tiny(), [3, 5], 4, "scalar") == 2 * LAYERS * 8 + 2 * 8 * 1 * 4 + squares
    assert flops.forward(tiny(), [8], 4) > flops.forward(tiny(), [3, 5], 4), "packed ones do not see each other"


@pytest.mark.parametrize("family", ["Qwen2", "Llama", "Qwen3"])
def test_torch_counts_the_same_products_in_transformers_model(family):
    """Its eager attention computes the whole square, of which ours counts the causal half."""
    hf, tokens = ROWS[family], 24
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf), attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long))
    arch = architecture.read(hf)
    rotations = 2 * arch.head_dim // 2 * tokens  # positions times frequencies
    other_half = 2 * flops.attention_elements(arch) * tokens**2
    assert counter.get_total_flops() - rotations == flops.forward(arch, [tokens], tokens) + other_half


def test_a_mixture_counts_its_router_and_the_experts_that_are_picked():
    arch = architecture.read(ROWS["Qwen3Moe"])
    without = dataclasses.replace(arch, experts=None)
    more = arch.hidden * (3 * arch.ffn * (arch.experts.per_token - 1) + arch.experts.count)
    assert flops.layer_elements(arch) - flops.layer_elements(without) == arch.layers * more


def samples(*lengths: int) -> list[Sample]:
    return [Sample((1, 2), tuple(range(length - 2)), 1.0 if length % 2 else -1.0, 0.5) for length in lengths]


@pytest.mark.parametrize("cut", [(64, 1, 1, 1), (12, 2, 2, 8), (9, 3, 4, 1)])  # budget, ranks, multiple, pad_to
def test_the_work_of_all_ranks_is_that_of_the_samples_however_they_are_cut(cut):
    budget, ranks, multiple, pad_to = cut
    lengths = (9, 7, 6, 4, 3)
    each = [
        speed.replica_work(packing.batch(samples(*lengths), PackingSpec(budget, rank, ranks, multiple, pad_to)), tiny())
        for rank in range(ranks)
    ]
    assert sum(one.tokens for one in each) == sum(lengths)
    for head in ("lm", "scalar"):
        rows = sum(lengths) - 2 * len(lengths)  # of prompts nothing reaches the head
        assert sum(one.forward[head] for one in each) == flops.forward(tiny(), lengths, rows, head)


def test_mfu_is_six_operations_a_paratimer_and_token_and_absent_where_the_peak_is_not_known():
    seconds, tokens = {"reference": 2.0, "policy": 4.0}, {"policy": 800}
    computed = {"reference": 2 * 5e9 * 800, "policy": 6 * 5e9 * 800}
    found = speed.rates(seconds, tokens, computed, 2, 1e13)
    assert found["speed/tokens_per_second_per_gpu/policy"] == 100
    assert found["speed/mfu/policy"] == pytest.approx(6 * 5e9 * 100 / 1e13) == pytest.approx(0.3)
    assert found["speed/mfu/reference"] == pytest.approx(0.2)
    assert found["speed/tflops_per_second_per_gpu/policy"] == pytest.approx(3.0)
    unknown = speed.rates(seconds, tokens, computed, 2, None)
    assert unknown == {name: value for name, value in found.items() if "mfu" not in name}


def test_a_peak_is_of_a_device_that_is_known_and_of_bf16():
    assert gpus.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12 == gpus.peak_flops("NVIDIA H200", "bfloat16")
    assert gpus.peak_flops("NVIDIA H200", "float32") is None is gpus.peak_flops("NVIDIA H100 PCIe", "bfloat16")


@pytest.mark.parametrize(
    ("each", "share"),
    [([4.0], 0.0), ([4.0] * 4, 0.0), ([1.0, 2.0, 3.0, 4.0], 0.375), ([0.0, 4.0], 0.5), ([0, 0], None)],
)
def test_idle_share_of_planted_times(each, share):
    assert speed.load_imbalance(each) == share


def test_idle_shares_of_phases_add_up_to_that_of_the_step_by_their_seconds():
    seconds = {"generate": 6.0, "verify": 1.0, "reference": 1.0, "policy": 2.0, "weight_sync": 1.0, "step": 12.0}
    alone = [{"generate": 3.0, "verify": 0.8}, {"generate": 6.0, "verify": 0.8}]
    found = speed.idle_shares(seconds, alone, [90.0, 100.0])
    assert found.pop("speed/idle/step") == pytest.approx((6 * 0.25 + 3 * 0.05) / 12)
    assert found == {"speed/idle/generate": 0.25, "speed/idle/verify": 0, "speed/idle/training": pytest.approx(0.05)}
    assert speed.idle_shares(seconds, [{}, {}], []) == {}, "nothing was measured"


@pytest.mark.parametrize(
    ("stages", "chunks", "micro_batches", "share"),
    [(1, 1, 8, 0.0), (4, 1, 8, 3 / 11), (4, 2, 8, 3 / 19), (4, 1, 1, 3 / 4), (2, 1, 1000, 1 / 1001)],
)
def test_the_bubble_of_known_schedules(stages, chunks, micro_batches, share):
    assert c.ParallelConfig(pipeline=stages, virtual=chunks).bubble(micro_batches) == pytest.approx(share)


@pytest.mark.parametrize("parts", [1, 3, 5])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    "models", [("reward_model", "reference", "policy"), ("reference", "policy"), ("reward_model",)]
)
def test_the_bubble_of_a_step_counts_every_fill_and_drain(parts, passes, models):
    """The oracle goes through the pipeline pass by pass: its micro-batches, then as many slots as other stages."""
    stages, chunks, sizes = 4, 2, [3, 4, 1, 2, 2][:parts]
    config = c.Config(
        parallel=c.ParallelConfig(pipeline=stages, virtual=chunks),
        loss=c.LossConfig(updates_per_step=parts * passes, mini_batches=parts),
    )
    runs = {"reward_model": [sum(sizes)] * 3, "reference": [sum(sizes)], "policy": sizes * passes * 3}
    busy = sum(chunks * size for model in models for size in runs[model])
    slots = sum(chunks * size + stages - 1 for model in models for size in runs[model])
    fills = speed.pipeline_fills(models, parts, config)
    assert config.parallel.bubble(sum(sizes), fills) == pytest.approx(1 - busy / slots)
    if parts == 1:
        assert fills == 1


def test_a_timed_step_counts_the_mini_batches_that_its_batch_has():
    """A step of two prompts has two mini-batches, whatever number is set."""
    config = c.Config(parallel=c.ParallelConfig(pipeline=3), loss=c.LossConfig(updates_per_step=5, mini_batches=5))
    timer = PhaseTimer(config)
    for name in ("reward_model", "reference", "policy"):
        with timer.phase(name):
            pass
    prompts = [dataclasses.replace(sample, rollout=(n, 0)) for n, sample in enumerate(samples(5, 4))]
    timer.count_work(packing.batch(prompts, PackingSpec(4), 5))
    expected = 1 - 7 * 2 / (3 * 4 + 4 + 3 * 6)  # reward model 2 + 2 slots, reference the same, policy twice 1 + 2
    assert timer.finish_step({}, rollouts())["speed/bubble"] == pytest.approx(expected)


def rollouts() -> list[list[Rollout]]:
    prompt = Prompt(0, "q", "1", None, (1, 2, 3))
    return [[Rollout(prompt, 0, index, (5,) * (index + 1), "", True) for index in range(4)]]  # 4 x 3 + 10 tokens


def test_what_a_rank_waits_for_others_is_not_its_own_time_and_an_evaluation_not_the_step_s():
    began, timer = time.monotonic(), PhaseTimer(c.Config(), tiny(), 1e9)
    with timer.phase("generate"):
        time.sleep(0.05)
        heartbeat.beat()
        time.sleep(0.1)  # in a collective
    assert 0.05 <= timer.own_seconds["generate"] <= timer.seconds["generate"] - 0.1
    with timer.phase("evaluate"):
        time.sleep(0.1)
    found = timer.finish_step({}, rollouts())
    assert time.monotonic() - began - 0.1 >= found["seconds/step"] >= found["seconds/generate"]
    assert found["seconds/evaluate"] >= 0.1
    assert found["speed/tokens_per_second_per_gpu/step"] == pytest.approx(22 / found["seconds/step"])
    assert not any("policy" in name or "bubble" in name for name in found), "nothing was trained"
    assert sum(value for name, value in found.items() if "share" in name) == pytest.approx(1)
    again = timer.finish_step({}, [])
    assert "seconds/generate" not in again and again["seconds/step"] < found["seconds/step"], (
        "every step is measured anew"
    )


@pytest.mark.parametrize(
    ("metrics", "reward_model", "models", "passes"),
    [
        ({}, True, {"reward_model", "reference", "policy"}, 1),
        ({}, False, {"reference", "policy"}, 2),
        ({"reward_model/consecutive_skips": 1, "policy/consecutive_skips": 1}, True, {"reward_model", "reference"}, 1),
        ({"policy/consecutive_skips": 1}, True, {"reward_model", "reference", "policy"}, 1),  # skipped after computing
    ],
)
def test_a_model_that_computes_nothing_has_no_speed(metrics, reward_model, models, passes):
    config = c.Config(
        reward_model=c.RewardModelConfig(enabled=reward_model),
        parallel=c.ParallelConfig(pipeline=2),
        loss=c.LossConfig(updates_per_step=4 * passes, mini_batches=4),
    )
    timer = PhaseTimer(config, tiny(), 1e9)
    for name in ("reward_model", "reference", "policy"):
        with timer.phase(name):
            time.sleep(0.001)
    timer.count_work(packing.batch(samples(5, 4), PackingSpec(4)))
    found = timer.finish_step(metrics, rollouts())
    assert {name.split("/")[2] for name in found if "tflops" in name} == models
    assert {name.split("/")[2] for name in found if "mfu" in name} == models
    assert found["speed/bubble"] == pytest.approx(1 / 3)  # two micro-batches on two stages
    forward = flops.forward(tiny(), [5, 4], 5)
    rate = forward / found["seconds/reference"]
    assert found["speed/tflops_per_second_per_gpu/reference"] == pytest.approx(rate / 1e12)
    if "policy" in models:
        assert found["speed/mfu/policy"] == pytest.approx(3 * passes * forward / found["seconds/policy"] / 1e9)
    json.dumps(found, allow_nan=False)


def row(step: int, seconds: dict[str, float], **rates: float) -> dict[str, float]:
    return {"step": step} | {f"seconds/{name}": value for name, value in seconds.items()} | rates


def written(folder: Path, rows: list[dict], **environment: object) -> Path:
    """A run folder with two frozen steps and these rows."""
    folder.mkdir()
    settings = {"seed": 0, "policy_freeze_steps": 2, "reward_model": {"enabled": True}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def some_rows() -> list[dict]:
    speed_of = "speed/tokens_per_second_per_gpu/generate"
    frozen = [row(step, {"generate": 50, "step": 100}, **{speed_of: 1.0}) for step in (0, 1)]
    whole = {speed_of: 100.0, "speed/mfu/policy": 0.3}
    whole |= {"weight_sync/received_bytes": 4e9, "weight_sync/gigabytes_per_second": 2.0}
    return [
        *frozen,
        row(2, {"generate": 2, "policy": 1, "weight_sync": 2, "step": 8}, **whole),
        row(3, {"generate": 9, "policy": 9, "step": 90}, **{speed_of: 9.0}),  # the first after a resumption
        row(4, {"generate": 6, "step": 8}, **{speed_of: 20.0, "speed/idle/generate": 0.5}),  # nothing to learn from
    ]  # fmt: skip


def test_the_table_is_over_all_rows_but_the_frozen_ones_and_first_ones_after_a_start(tmp_path):
    run = written(tmp_path / "run", some_rows())
    (run / "config_before_step_3.json").write_text("{}")
    found = speed_report.summary(run_report.read_run(run))
    assert found["steps"] == {"logged": 5, "counted": 2, "first": 2}
    phases = found["phases"]
    assert phases["generate"] == {"seconds": 4, "share": 0.5, "tokens_per_second_per_gpu": 40.0, "idle": 0.5}, (
        "320 tokens of 8 seconds"
    )
    assert phases["policy"] == {"seconds": 0.5, "share": 1 / 16, "mfu": 0.3}
    assert phases["other"] == {"seconds": 2.5, "share": pytest.approx(2.5 / 8)} and phases["step"]["seconds"] == 8
    assert found["sync"] == {"seconds": 2.0, "received_bytes": 4e9, "gigabytes_per_second": 2.0}
    assert "hardware" not in found and "bubble" not in found, "not recorded"


def test_a_run_of_frozen_steps_alone_or_of_one_step_is_reported_from_what_there_is(tmp_path):
    frozen = run_report.read_run(written(tmp_path / "frozen", some_rows()[:2]))
    assert speed_report.summary(frozen)["steps"] == {"logged": 2, "counted": 1, "first": 1}
    one = run_report.read_run(written(tmp_path / "one", some_rows()[:1]))
    assert speed_report.summary(one)["steps"] == {"logged": 1, "counted": 1, "first": 0}
    speed_report.write_and_print(run_report.read_run(written(tmp_path / "none", [])))
    assert not (tmp_path / "none/speed.json").exists()


def test_the_report_prints_several_runs_and_those_that_were_not_evaluated(tmp_path, capsys):
    on = {"device": "NVIDIA H200", "gpus": 16, "nodes": 2, "peak_tflops": 989.0}
    new, old = written(tmp_path / "new", some_rows(), hardware=on), written(tmp_path / "old", [row(0, {"step": 3.0})])
    assert main(["report", str(new), str(old)]) == 0
    said = capsys.readouterr().out
    for words in (
        "16 ranks on 2 nodes (NVIDIA H200)",
        "30.0%",
        "2 GB/s",
        "hardware not recorded",
        "not evaluated",
    ):
        assert words in said
    assert max(map(len, said.splitlines())) <= 80
    speed_report.write_and_print(run_report.read_run(new))
    assert json.loads((new / "speed.json").read_text())["hardware"] == on
