"""Rehearsals without data: sound layouts are found sound, planted errors are named, what is planned is what is built.

The plan's formulas are compared with three things: what Megatron builds on the meta device, what autograd keeps there
as on a GPU, and bytes of a real training step on CPUs.
"""

from __future__ import annotations

import dataclasses

import pytest

HF = dict(
    architectures=["Qwen2ForCausalLM"], num_hidden_layers=4, hidden_size=128, intermediate_size=384,
    num_attention_heads=8, num_key_value_heads=4, vocab_size=203, max_position_embeddings=2048, rope_theta=1e6,
)  # fmt: skip
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK = FULL | {"recompute_method": "block", "recompute_num_layers": 3}
SELECTIVE = {"recompute_granularity": "selective"}
# Tensor, pipeline, context, virtual; what is computed again.
LAYOUTS = (((2, 2, 1, 1), FULL), ((2, 2, 1, 2), {}), ((2, 1, 2, 1), SELECTIVE), ((4, 1, 1, 1), BLOCK))


def case(tensor: int, pipeline: int, context: int, virtual: int, recompute: dict, world: int = 8, **model):
    from oreal_megatron import config as c
    from oreal_megatron.models import architecture
    from oreal_megatron.plan import assumptions, gpus
    from oreal_megatron.plan.scenario import Scenario

    config = c.Config(
        model=c.ModelConfig(**{"dtype": "bfloat16"} | model),
        parallel=c.ParallelConfig(tensor, pipeline, virtual, context, sequence=tensor > 1),
        engine=c.EngineConfig(tensor=2, max_model_len=300, buffer_mib=1),
        sampling=c.SamplingConfig(max_new_tokens=280),
        data=c.DataConfig(prompts_per_step=8),
        tokens_per_micro_batch=256,
        megatron=recompute,
    )
    assumed = assumptions.Assumptions(prompt_tokens=16, response_tokens=100)
    return Scenario(config, architecture.read(HF), gpus.find_gpu("h100-80g"), world, 4, assumed)


def every_layout() -> list[dict]:
    from oreal_megatron.plan import activations, memory, rehearsal, synthetic, timing

    results = []
    for layout, recompute in LAYOUTS:
        one = case(*layout, recompute)
        one.check()
        done = rehearsal.play(one, synthetic.default_ranks(one))
        ratios = {part: [] for part in ("parameters", "gradients", "optimizer", "activations")}
        for rank in done.ran:
            stage = rank.rank // (one.world // one.config.parallel.pipeline)
            for name, parts in rank.bytes.items():
                held = memory.model_bytes(one, stage, one.roles[name])
                for part, size in parts.items():
                    ratios[part].append(held[part] / size)
            kept = activations.saved_bytes_for(one.arch, one.config, stage, rank.tokens)
            ratios["activations"].append(kept / rank.activation_bytes["policy"])
        replica = [rank for rank in (*done.ran, *done.built) if rank.rank in synthetic.one_replica(one)]
        ratios["checkpoint"] = [timing.checkpoint(one)[0] / rehearsal.written(replica)]
        tokens = {len(set(rank.tokens)) for rank in done.ran}
        results.append(
            {"broken": done.errors, "faults": rehearsal.checks(one, done), "ratios": ratios, "tokens": tokens}
        )
    return results


def with_every_part_of_t1() -> dict:
    """A rehearsal with a moving reference, KL in the reward and the entropy bonus."""
    from oreal_megatron import config as c
    from oreal_megatron.plan import rehearsal, synthetic

    plain = case(2, 1, 1, 1, {}, world=2)
    config = dataclasses.replace(
        plain.config, reference=c.ReferenceConfig(0.9), reward_model=c.RewardModelConfig(enabled=False),
        selection=c.SelectionConfig(keep="all"), loss=c.LossConfig(reward_kl_coef=0.1, entropy_coef=0.1),
    )  # fmt: skip
    scenario = dataclasses.replace(plain, config=config)
    done = rehearsal.play(scenario, synthetic.default_ranks(scenario))
    sizes = {(name, part): size for name, parts in done.ran[0].bytes.items() for part, size in parts.items()}
    return {"errors": done.errors, "faults": rehearsal.checks(scenario, done), "sizes": sizes}


TERM = """
def term(logp_T, tokens, counts):
    return -((logp_T - tokens.old_logp).exp() * tokens.advantage).sum() / counts.action_tokens
"""


def several_updates(terms: str) -> dict:
    """A rehearsal of a step with six updates on two mini-batches; one of two, and of three, on a rank of it."""
    from oreal_megatron import config as c
    from oreal_megatron.mcore import rehearse_rank
    from oreal_megatron.plan import rehearsal, synthetic

    def scenario(updates: int, parts: int):
        plain = case(1, 2, 1, 1, {}, world=4)
        loss = c.LossConfig(ratio_cap=2.0, term=terms, updates_per_step=updates, mini_batches=parts)
        return dataclasses.replace(plain, config=dataclasses.replace(plain.config, loss=loss))

    several = scenario(6, 2)
    samples, done = synthetic.samples(several), rehearsal.play(several, range(4))
    pair, odd = (
        rehearse_rank.rehearse(several.arch, scenario(*loss).config, 4, rank, samples)
        for rank, loss in ((0, (2, 2)), (1, (3, 3)))
    )
    planted = dataclasses.replace(done, ran=[odd if rank.rank == 1 else rank for rank in done.ran])
    return {
        "errors": done.errors,
        "faults": rehearsal.checks(several, done),
        "parts": [rank.mini_batches for rank in done.ran],
        "reductions": [sum("scatter" in call.operation for call in rank.calls) for rank in (done.ran[0], pair)],
        "planted": rehearsal.checks(several, planted),
    }


def test_every_update_of_a_step_is_played_and_a_third_pass_is_not(in_processes, tmp_path):
    """With the parts of a loss that read other log-probs: a ratio to the engine's, and a term of the user."""
    (tmp_path / "terms.py").write_text(TERM)
    (result,) = in_processes(1, several_updates, f"{tmp_path}/terms.py:term")
    assert not result["errors"] and not any(result["faults"].values()), result["faults"]
    assert len(set(result["parts"])) == 1 and len(result["parts"][0]) == 2 and min(result["parts"][0]) > 0
    assert result["reductions"] == [5, 3], "gradients of the reward model once, and twice on each mini-batch or once"
    assert any("in 2 mini-batches" in what for what in result["faults"])
    faults = {what.split(":")[0]: said for what, said in result["planted"].items()}
    assert faults["collectives"] and "different numbers of micro-batches" in faults["packing"][0]


def test_t1_runs_without_data_and_its_average_is_float32(in_processes):
    (result,) = in_processes(1, with_every_part_of_t1)
    assert not result["errors"] and not any(result["faults"].values())
    sizes = result["sizes"]
    assert sizes["reference", "average"] == 2 * sizes["reference", "parameters"] > 0


def planted() -> dict[str, dict]:
    """Faults that a rehearsal finds when one rank, the second of eight, is otherwise."""
    from oreal_megatron.mcore import rehearse_rank
    from oreal_megatron.plan import rehearsal, synthetic

    sound = case(2, 2, 1, 1, {})
    odd, config, cut = 1, sound.config, sound.config.parallel
    done = rehearsal.play(sound, range(8))
    wrong = {
        "another cut": dataclasses.replace(config, parallel=dataclasses.replace(cut, tensor=4, pipeline=1)),
        "no sequence parallelism": dataclasses.replace(config, parallel=dataclasses.replace(cut, sequence=False)),
        "smaller micro-batches": dataclasses.replace(config, tokens_per_micro_batch=128),
        "no reward model": dataclasses.replace(
            config, reward_model=dataclasses.replace(config.reward_model, enabled=False)
        ),
        "no bias": config,
    }
    found = {}
    for error, other in wrong.items():
        arch = dataclasses.replace(sound.arch, qkv_bias=error != "no bias")
        other = rehearse_rank.rehearse(arch, other, 8, odd, synthetic.samples(sound))
        played = [other if one.rank == odd else one for one in done.ran]
        found[error] = rehearsal.checks(sound, dataclasses.replace(done, ran=played))
    uneven = dataclasses.replace(config, parallel=dataclasses.replace(cut, tensor=4, pipeline=1))
    three_heads = dataclasses.replace(sound.arch, heads=6, kv_groups=3)
    broken = rehearsal.play(dataclasses.replace(sound, config=uneven, arch=three_heads), [0]).errors
    return found | {"uneven heads": {"broken": broken}}


@pytest.fixture(scope="module")
def layouts(in_processes) -> list[dict]:
    return in_processes(1, every_layout)[0]


def test_sound_layouts_are_found_sound(layouts):
    for (layout, _), result in zip(LAYOUTS, layouts, strict=True):
        assert not result["broken"], layout
        assert len(result["faults"]) == 6 and not any(result["faults"].values()), (layout, result["faults"])
    assert max(max(result["tokens"]) for result in layouts) > 1, "micro-batches of different sizes were rehearsed"


def test_what_is_planned_is_what_megatron_builds_and_autograd_keeps(layouts):
    for (layout, recompute), result in zip(LAYOUTS, layouts, strict=True):
        for part, ratios in result["ratios"].items():
            off = 0.15 if part == "activations" else 0.03
            assert ratios and all(abs(ratio - 1) < off for ratio in ratios), (layout, recompute, part, ratios)


def test_planted_errors_are_named(in_processes):
    found = {error: {what.split(":")[0]: said for what, said in checks.items()}
             for error, checks in in_processes(1, planted)[0].items()}  # fmt: skip
    assert "process group" in found["another cut"]["process groups"][0] and "on rank 1" in str(found["another cut"])
    quiet = found["no sequence parallelism"]
    assert not quiet["process groups"] and "waits in its collective" in quiet["collectives"][0]
    packed = found["smaller micro-batches"]
    assert "different numbers of micro-batches" in packed["packing"][0]
    assert "bytes are sent" in packed["messages between pipeline stages"][0]
    assert found["no reward model"]["collectives"]
    bias = found["no bias"]
    assert "linear_qkv.bias: only" in str(bias["checkpoint"]) and "linear_qkv.bias, which is not there" in str(
        bias["weight sync"]
    )
    assert "rank 0: " in found["uneven heads"]["broken"][0]


def recorded() -> dict[str, list]:
    """The same call on two ranks, and with another root or type."""
    import torch
    import torch.distributed as dist

    from oreal_megatron.mcore import fake_world

    calls = {
        "broadcast": lambda: dist.broadcast(torch.zeros(2), 0),
        "root": lambda: dist.broadcast(torch.zeros(2), 1),
        "sum": lambda: dist.all_reduce(torch.zeros(2)),
        "type": lambda: dist.all_reduce(torch.zeros(2, dtype=torch.int32)),
    }
    found = {}
    for rank in (0, 1):
        with fake_world.simulate_rank(2, rank) as record:
            for name, call in calls.items():
                call()
                found.setdefault(name, []).append(tuple(record.calls[-1]))
    return found


def test_a_call_is_told_from_one_of_another_root_or_type(in_processes):
    found = in_processes(1, recorded)[0]
    assert all(one == two for one, two in found.values())
    assert len({one for one, _ in found.values()}) == len(found)


def real_steps() -> list[dict[str, float]]:
    """Planned over measured bytes of reward models that really train, in fp32 on this machine's CPUs."""
    import torch.distributed as dist

    from oreal_megatron.mcore import parallel

    parallel.start_process_group()
    cases = [case(1, 1, 1, 1, recompute, world=dist.get_world_size(), dtype="float32") for recompute in ({}, FULL)]
    parallel.start_megatron(cases[0].config.parallel, seed=0)
    ratios = [real_step(one) for one in cases]
    parallel.stop()
    return ratios


def real_step(one) -> dict[str, float]:
    import torch

    from oreal_megatron.algo import packing
    from oreal_megatron.mcore import parallel, rehearse_rank, trained_models
    from oreal_megatron.models import tensors
    from oreal_megatron.plan import activations, memory
    from oreal_megatron.records import Sample

    shapes = {}
    for entry in tensors.entries(one.arch, 1, 1, 0, "scalar"):
        shapes |= tensors.hf_shapes(entry, one.arch)
    model = trained_models.TokenRewardModel(one.arch, one.config, lambda name: torch.full(shapes[name], 0.01))
    samples = [Sample((1,) * 6, (2,) * 250, sign, sign) for sign in (1.0, -1.0)] * one.world
    batch = packing.batch(samples, parallel.packing_spec(256))
    watch = rehearse_rank.ActivationCounter(model.parts["parameters"].tensors())
    with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda saved: saved.tensor):
        model.update(batch)
    planned = memory.model_bytes(one, 0, "scalar")
    ratios = {part: planned[part] / held.bytes() for part, held in model.parts.items()}
    return ratios | {"activations": activations.saved_bytes(one.arch, one.config, 0, 256, 2) / watch.peak}


def test_planned_bytes_are_those_of_real_steps(in_processes):
    """A CPU keeps more than a GPU: norms in several operations, attention of padded sequences."""
    for ratios in (ratios for results in in_processes(2, real_steps) for ratios in results):
        assert 0.85 < ratios.pop("activations") < 1.15
        assert ratios.keys() == {"parameters", "gradients", "optimizer"}
        assert all(0.97 < ratio < 1.03 for ratio in ratios.values()), ratios
