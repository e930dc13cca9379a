"""Skipped steps: nothing changes on any rank, wherever the nan arose, and training continues undisturbed."""

from __future__ import annotations

import math

import pytest
import torch

# Processes: layout and dtype of its weights.
LAYOUTS = {
    1: {"alone": ({}, "float32")},
    2: {
        "data parallel": ({}, "bfloat16"),
        "pipeline parallel": (dict(pipeline=2), "float32"),
        "tensor": (dict(tensor=2), "bfloat16"),
    },
}


def stories(folder: str, layouts: dict[str, tuple], samples: list) -> dict:
    from megatron.core import parallel_state

    from oreal_megatron import config as c
    from oreal_megatron.mcore import parallel

    found = {}
    parallel.start_process_group()
    for name, (layout, dtype) in layouts.items():
        optimizer = c.OptimizerConfig(lr=1e-2, warmup_steps=1)
        config = c.Config(
            model=c.ModelConfig(folder, dtype=dtype),
            parallel=c.ParallelConfig(**layout),
            optimizer=optimizer,
            reward_model=c.RewardModelConfig(head_init="normal", optimizer=optimizer),
            guard=c.GuardConfig(spike_factor=1e-3, spike_window=3),
        )
        parallel.start_megatron(config.parallel, seed=0)
        found[name] = story(folder, config, samples)
        parallel_state.destroy_model_parallel()
    parallel.start_megatron(c.ParallelConfig(), seed=0)
    parallel.stop()
    return found


class Models:
    def __init__(self, folder: str, config):
        from oreal_megatron.convert.hf_folder import HFFolder
        from oreal_megatron.mcore import trained_models
        from oreal_megatron.models import architecture

        source = HFFolder(folder)
        pieces = (architecture.read(source.config), config, source.tensor)
        self.policy, self.reference = trained_models.Policy(*pieces), trained_models.Reference(*pieces)
        self.reward_model = trained_models.TokenRewardModel(*pieces)

    def step(self, batch) -> dict:
        token_weights, metrics = self.reward_model.update(batch)
        return metrics | self.policy.update(batch, self.reference.score(batch), token_weights)

    def state(self) -> list:
        """Everything that a step changes, on this rank."""
        from oreal_megatron.mcore import adam

        bits = []
        for trainer in (self.policy, self.reward_model):
            bits += [parameter.detach() for chunk in trainer.chunks for parameter in chunk.parameters()]
            bits += adam.state_tensors(trainer.optimizer)
            bits += [
                state["step"] for inner in adam.torch_optimizers(trainer.optimizer) for state in inner.state.values()
            ]
            bits += [torch.tensor([group["lr"] for group in trainer.optimizer.param_groups] + [trainer.updates])]
        return [value.clone() for value in bits]


def story(folder: str, config, samples: list) -> dict:
    from megatron.core import parallel_state

    from oreal_megatron.algo import packing
    from oreal_megatron.mcore import parallel
    from oreal_megatron.records import TokenWeights
    from oreal_megatron.runtime import distributed

    batches = [packing.batch(samples[4 * i : 4 * i + 4], parallel.packing_spec(60)) for i in range(3)]
    models, twin = Models(folder, config), Models(folder, config)
    last = distributed.rank() == distributed.world_size() - 1
    rows = {}

    def record_skip(name: str, metrics: dict, before: list) -> None:
        rows[name] = metrics, all(map(torch.equal, before, models.state()))

    models.step(batches[0])
    before = models.state()
    first = next(models.reward_model.chunks[0].parameters())
    mine = parallel_state.is_pipeline_first_stage() and (last or config.parallel.pipeline > 1)
    hook = first.register_hook(lambda gradient: gradient * math.nan if mine else gradient)
    record_skip("gradient of one rank's reward model", models.step(batches[1]), before)
    hook.remove()

    models.reward_model.update(batches[1])
    before = models.state()
    reference = models.reference.score(batches[1])
    token_weights = TokenWeights([torch.ones(len(part.labels)) for part in batches[1].micro_batches])
    for weight_T in token_weights.values if last else ():
        weight_T[:1] = math.nan
    record_skip("token weight of one rank", models.policy.update(batches[1], reference, token_weights), before)

    models.step(batches[2])
    twin.step(batches[0]), twin.reward_model.update(batches[1]), twin.step(batches[2])
    rows["afterwards"] = all(map(torch.equal, models.state(), twin.state()))

    for _ in range(2):
        models.step(batches[0])
    before = models.state()
    record_skip("spike", models.step(batches[1]), before)

    with torch.no_grad():
        next(models.policy.chunks[0].parameters()).view(-1)[0] = math.inf if last else 0.0
    rows["broken"] = models.policy.update(batches[1], reference, token_weights)
    return rows


@pytest.mark.parametrize("world", LAYOUTS)
def test_a_skipped_step_changes_nothing_on_any_rank(world, model_folder, in_processes, make_samples):
    from oreal_megatron import config as c
    from oreal_megatron.algo import guard

    found = in_processes(world, stories, str(model_folder), LAYOUTS[world], make_samples(6, seed=8))
    for name in found[0]:
        assert all(repr(rank[name]) == repr(found[0][name]) for rank in found), "ranks disagree"
        rows = found[0][name]
        metrics, unchanged = rows["gradient of one rank's reward model"]
        assert unchanged and math.isnan(metrics["reward_model/gradient_norm"]), name
        assert math.isfinite(metrics["loss/reward_model"]), "only the gradient was spoilt"
        assert metrics["reward_model/skipped"] == metrics["policy/skipped"] == 1, "no policy learns from its weights"
        metrics, unchanged = rows["token weight of one rank"]
        assert unchanged and metrics["policy/skipped"] == metrics["policy/consecutive_skips"] == 2, name
        assert "policy/gradient_norm is nan" in guard.skip_reason(metrics)
        assert rows["afterwards"], f"{name}: a skipped step left a trace"
        metrics, unchanged = rows["spike"]
        assert unchanged and metrics["reward_model/gradient_norm"] > metrics["reward_model/gradient_norm_limit"], name
        with pytest.raises(c.RunStopped, match="policy has weights that are not finite"):
            guard.check(rows["broken"], c.GuardConfig(), 0)
