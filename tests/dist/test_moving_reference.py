"""A reference that follows the policy: an fp64 oracle on each rank's shards, offloaded or not, exact on resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

STEPS, SAVE_AT, EVERY = 5, 3, 2
LAYOUTS = {  # processes, sizes, then dtype, decay, offload
    "float32": (1, {}, "float32", 0.9, False),
    "bfloat16, offloaded": (1, {}, "bfloat16", 0.9, True),
    "bfloat16, copies": (1, {}, "bfloat16", 0.0, False),
    "data parallel, overlapped": (2, {"overlap": True}, "bfloat16", 0.9, False),
    "pipeline parallel": (2, {"pipeline": 2}, "bfloat16", 0.9, False),
    "tensor and sequence parallel": (2, {"tensor": 2, "sequence": True}, "bfloat16", 0.9, True),
}
DEFAULT = ("bfloat16, offloaded", "data parallel, overlapped")


def shards(model) -> list[torch.Tensor]:
    """This rank's parameters, complete also where an update is still to be gathered."""
    from oreal_megatron.mcore.scorer import parameters

    with model.readable():
        chunks = getattr(model, "average", model.chunks)
        return [tensor.detach().clone().double() for tensor in parameters(chunks)]


def models(folder: str, sizes: dict, dtype: str, decay: float, offload: bool):
    from oreal_megatron import config as c
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore.moving_reference import build_reference
    from oreal_megatron.mcore.trained_models import Policy
    from oreal_megatron.models import architecture

    config = c.Config(
        model=c.ModelConfig(folder, dtype), parallel=c.ParallelConfig(**sizes), offload=offload,
        optimizer=c.OptimizerConfig(lr=1e-2, warmup_steps=0), reward_model=c.RewardModelConfig(enabled=False),
        reference=c.ReferenceConfig(decay, EVERY), selection=c.SelectionConfig(keep="all"),
        loss=c.LossConfig(kl_coef=0.5, reward_kl_coef=0.05, entropy_coef=0.01),
    )  # fmt: skip
    source = HFFolder(folder)
    pieces = (architecture.read(source.config), config, source.tensor)
    policy = Policy(*pieces)
    return config, {"policy": policy, "reference": build_reference(*pieces, policy)}


def steps(config, trained: dict, samples: list, numbers: range, read_policy: bool = True) -> list[dict]:
    """Metrics and shards after each step; reading the policy's gathers what overlapped updates have left to gather."""
    from oreal_megatron.algo import packing
    from oreal_megatron.mcore import parallel, trained_models

    rows = []
    for step in numbers:
        batch = packing.batch(samples[4 * step : 4 * step + 4], parallel.packing_spec(60))
        reference_logp = trained["reference"].score(batch)
        token_weights, _ = trained_models.NoRewardModel(config).update(batch)
        metrics = trained["policy"].update(batch, reference_logp, token_weights)
        policy = shards(trained["policy"]) if read_policy or step == STEPS - 1 else []
        rows.append({"metrics": metrics, "policy": policy, "average": shards(trained["reference"])})
    return rows


def story(folder: str, layout: tuple, samples: list, path: str):
    from oreal_megatron.config import ParallelConfig
    from oreal_megatron.mcore import checkpoint_state, parallel
    from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver
    from oreal_megatron.mcore.scorer import parameters

    parallel.start_process_group()
    parallel.start_megatron(ParallelConfig(**layout[0]), seed=0)
    config, trained = models(folder, *layout)
    start = shards(trained["reference"])
    rows = steps(config, trained, samples, range(SAVE_AT))
    CheckpointSaver(Path(path), trained, keep=1).save(SAVE_AT)
    rows += steps(config, trained, samples, range(SAVE_AT, STEPS))
    at_rest = {name: part.bytes() for name, part in trained["reference"].parts.items()}
    reference = trained["reference"]
    with reference.parts.on_device("parameters"):
        rounded = [tensor.double() for tensor in parameters(reference.chunks)]
    _, fresh = models(folder, *layout)
    names = ["policy", "reference"]
    step = checkpoint_state.load(checkpoint_state.choose(Path(path), names, None, False), fresh)
    again = steps(config, fresh, samples, range(step, STEPS), read_policy=False)
    parallel.stop()
    return start, rows, again, rounded, at_rest


@pytest.mark.parametrize(
    "name", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]
)
def test_the_reference_is_the_average_of_the_policy_and_continues_exactly(
    name, model_folder, in_processes, make_samples, tmp_path
):
    processes, *layout = LAYOUTS[name]
    _, dtype, decay, offload = layout
    samples = make_samples(2 * STEPS, seed=4)
    for start, rows, again, rounded, at_rest in in_processes(
        processes, story, str(model_folder), layout, samples, str(tmp_path)
    ):
        average, seen = start, 0
        for step, row in enumerate(rows):
            if step - seen >= EVERY:  # before it scores, with the policy after `step` updates
                policy = rows[step - 1]["policy"]
                average = [decay * old + (1 - decay) * new for old, new in zip(average, policy, strict=True)]
                seen = step
            for expected, value in zip(average, row["average"], strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
        assert not all(torch.equal(old, new) for old, new in zip(start, average, strict=True))
        precision = getattr(torch, dtype)
        exact = zip(rows[-1]["average"], rounded, strict=True)
        assert all(torch.equal(wide.to(precision), own.to(precision)) for wide, own in exact)
        for expected, value in zip(rows[SAVE_AT:], again, strict=True):
            assert expected["metrics"] == value["metrics"]
            for part in ("policy", "average"):
                pairs = zip(expected[part], value[part], strict=True) if value[part] else ()
                assert all(torch.equal(old, new) for old, new in pairs)
        assert again[-1]["policy"]
        assert set(at_rest) == {"parameters"} | ({"average"} if dtype == "bfloat16" and decay else set())
        assert all((size == 0) == offload for size in at_rest.values())


def follow(folder: str, sizes: dict, samples: list) -> list[dict]:
    from oreal_megatron.config import ParallelConfig
    from oreal_megatron.mcore import parallel

    parallel.start_process_group()
    parallel.start_megatron(ParallelConfig(**sizes), seed=0)
    rows = steps(*models(folder, sizes, "float32", 0.5, False), samples, range(STEPS))
    parallel.stop()
    return [row["metrics"] for row in rows]


@pytest.mark.full
@pytest.mark.parametrize("sizes", [{}, {"pipeline": 2}, {"context": 2}, {"tensor": 2, "sequence": True}])
def test_kl_in_the_reward_and_entropy_are_those_of_one_process(sizes, model_folder, in_processes, make_samples):
    samples = make_samples(2 * STEPS, seed=4)
    (alone,) = in_processes(1, follow, str(model_folder), {}, samples)
    for rows in in_processes(2, follow, str(model_folder), sizes, samples):
        for expected, row in zip(alone, rows, strict=True):
            assert row == pytest.approx(expected, rel=2e-3, abs=2e-4)
            assert row["policy/entropy"] > 0
    assert abs(alone[-1]["policy/response_kl"]) > 1e-4 and alone[0]["policy/response_kl"] == pytest.approx(0, abs=1e-5)
