"""Train four steps, or two and two more in fresh models from the checkpoint: the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pieces(folder: str, tensor: int, pipeline: int = 1, dtype: str = "float32", **changes: float):
    from oreal_megatron import config as c
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.models import architecture

    optimizer = c.OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1, **changes)
    config = c.Config(
        model=c.ModelConfig(folder, dtype),
        parallel=c.ParallelConfig(tensor, pipeline),
        steps=4,
        policy_freeze_steps=1,
        optimizer=optimizer,
        reward_model=c.RewardModelConfig(head_init="normal", optimizer=optimizer),
        guard=c.GuardConfig(spike_factor=1e6, spike_window=1),  # whose limit, in the metrics, is of the step before
    )
    source = HFFolder(folder)
    return architecture.read(source.config), config, source.tensor


def trainers(*layout, reward_model: bool = True, **changes: float):
    from oreal_megatron.mcore import trained_models

    made = pieces(*layout, **changes)
    models = {"policy": trained_models.Policy(*made)} | (
        {"reward_model": trained_models.TokenRewardModel(*made)} if reward_model else {}
    )
    return models, trained_models.Reference(*made)


def go_on(models: dict, reference, samples: list, steps: range) -> list:
    from oreal_megatron.algo import packing
    from oreal_megatron.mcore import parallel, trained_models

    rows, reward_model = [], models.get("reward_model", trained_models.NoRewardModel(models["policy"].config))
    for step in steps:
        batch = packing.batch(samples[4 * step : 4 * step + 4], parallel.packing_spec(60))
        token_weights, learned = reward_model.update(batch)
        rows.append(
            learned | (models["policy"].update(batch, reference.score(batch), token_weights) if step >= 1 else {})
        )
    return rows


def all_state(models: dict) -> dict:
    """Weights, main weights and moments of this rank."""
    from oreal_megatron.mcore import adam

    optimizers = {
        f"{name} optimizer {place}": tensor.clone()
        for name, model in models.items()
        for place, tensor in enumerate(adam.state_tensors(model.optimizer))
    }
    return optimizers | {
        f"{name} {chunk} {key}": value.detach().clone()
        for name, model in models.items()
        for chunk, module in enumerate(model.chunks)
        for key, value in module.module.named_parameters()
    }


def story(layout: tuple, reward_model: bool, samples: list, path: str, save_at: int):
    from oreal_megatron.mcore import checkpoint_state, parallel
    from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver

    parallel.start_process_group()
    parallel.start_megatron(pieces(*layout)[1].parallel, seed=0)
    models, reference = trainers(*layout, reward_model=reward_model)
    go_on(models, reference, samples, range(save_at))
    saver = CheckpointSaver(Path(path), models, keep=2)
    saver.start(save_at)
    rows = go_on(models, reference, samples, range(save_at, 4))  # while it is written
    saver.finish()
    state, random_numbers = all_state(models), torch.randn(3)

    fresh, reference = trainers(*layout, reward_model=reward_model)
    torch.manual_seed(999)
    step = checkpoint_state.load(checkpoint_state.choose(Path(path), list(fresh), None, False), fresh)
    again = go_on(fresh, reference, samples, range(step, 4))
    result = rows, state, random_numbers, step, again, all_state(fresh), torch.randn(3)
    decayed = with_other_settings(layout, reward_model, samples, path) if save_at else {}
    parallel.stop()
    return *result, decayed


OTHER = {"weight_decay": 3.0, "adam_beta1": 0.5, "adam_beta2": 0.7}


def with_other_settings(layout: tuple, reward_model: bool, samples: list, path: str) -> dict:
    """Continue from the checkpoint with other settings of the optimizers; return settings of groups, and state."""
    from oreal_megatron.mcore import checkpoint_state

    changed, reference = trainers(*layout, reward_model=reward_model, **OTHER)
    step = checkpoint_state.load(checkpoint_state.choose(Path(path), list(changed), None, False), changed)
    groups = [group for model in changed.values() for group in model.optimizer.param_groups]
    settings = {(group["weight_decay"], *group["betas"], group["eps"]) for group in groups}
    go_on(changed, reference, samples, range(step, 4))
    return {"settings": settings, "state": all_state(changed)}


@pytest.mark.parametrize(
    ("processes", "tensor", "pipeline", "dtype", "reward_model", "save_at"),
    [
        pytest.param(2, 1, 1, "float32", True, 0, marks=pytest.mark.full),  # no optimizer has taken a step yet
        (2, 1, 1, "bfloat16", True, 2),
        pytest.param(2, 2, 1, "float32", False, 2, marks=pytest.mark.full),
        (2, 1, 2, "float32", True, 2),
        pytest.param(4, 2, 2, "bfloat16", True, 2, marks=pytest.mark.full),
    ],
    ids=["data parallel, fresh", "data parallel, bfloat16", "tensor parallel", "pipeline parallel", "both, bfloat16"],
)
def test_resume_is_exact(
    processes, tensor, pipeline, dtype, reward_model, save_at, model_folder, in_processes, make_samples, tmp_path
):
    layout = (str(model_folder), tensor, pipeline, dtype)
    ranks = in_processes(processes, story, layout, reward_model, make_samples(16, seed=8), str(tmp_path), save_at)
    for rows, state, random_numbers, step, again, state_again, random_again, changed in ranks:
        assert step == save_at and rows == again
        assert state.keys() == state_again.keys()
        assert all(torch.equal(value, state_again[name]) for name, value in state.items())
        assert torch.equal(random_numbers, random_again)
        if changed:  # settings of the optimizers come from the configuration, not from the checkpoint
            assert changed["settings"] == {(*OTHER.values(), 1e-8)}
            assert not all(torch.equal(value, changed["state"][name]) for name, value in state.items())


class FusedAdam(torch.optim.AdamW):
    """In the place of Transformer Engine's."""

    def __init__(self, *args, adam_w_mode: bool, **kwargs):
        super().__init__(*args, **kwargs)


def optimizer_made(folder: str) -> list[str]:
    import megatron.core.optimizer
    from megatron.core.optimizer import distrib_optimizer

    from oreal_megatron.mcore import adam, parallel

    # What Megatron's imports leave behind where Transformer Engine is installed.
    megatron.core.optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.HAVE_APEX_OR_TE = False, True
    megatron.core.optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    parallel.start_process_group()
    parallel.start_megatron(pieces(folder, 1)[1].parallel, seed=0)
    models, _ = trainers(folder, 1, reward_model=False)
    made = adam.torch_optimizers(models["policy"].optimizer)
    models["policy"].optimizer.state_dict()  # reads `step` where torch's AdamW keeps it
    parallel.stop()
    return [type(inner).__name__ for inner in made]


def test_transformer_engine_does_not_change_the_optimizer(model_folder, in_processes):
    assert in_processes(1, optimizer_made, str(model_folder)) == [["AdamW"]]


def save_only(folder: str, tensor: int, samples: list, path: str):
    from oreal_megatron.mcore import parallel
    from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver
    from oreal_megatron.reshard.weight_sync import full_tensors

    parallel.start_process_group()
    parallel.start_megatron(pieces(folder, tensor)[1].parallel, seed=0)
    models, reference = trainers(folder, tensor)
    go_on(models, reference, samples, range(2))
    CheckpointSaver(Path(path), models, keep=1).save(2)
    rows = go_on(models, reference, samples, range(2, 4))
    weights = {name: value.clone() for name, value in full_tensors(models["policy"])}
    parallel.stop()
    return rows, weights


def load_only(folder: str, tensor: int, pipeline: int, samples: list, path: str):
    from oreal_megatron.mcore import checkpoint_state, parallel
    from oreal_megatron.reshard.weight_sync import full_tensors

    parallel.start_process_group()
    parallel.start_megatron(pieces(folder, tensor, pipeline)[1].parallel, seed=0)
    models, reference = trainers(folder, tensor, pipeline)
    step = checkpoint_state.load(checkpoint_state.choose(Path(path), list(models), None, False), models)
    rows = go_on(models, reference, samples, range(step, 4))
    weights = {name: value.clone() for name, value in full_tensors(models["policy"])}
    parallel.stop()
    return rows, weights


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (1, 2)], ids=["data parallel 2", "pipeline parallel 2"])
def test_a_checkpoint_loads_at_another_layout(tensor, pipeline, model_folder, in_processes, make_samples, tmp_path):
    folder, samples = str(model_folder), make_samples(16, seed=8)
    wanted_rows, wanted = in_processes(2, save_only, folder, 2, samples, str(tmp_path))[0]
    for rows, weights in in_processes(2, load_only, folder, tensor, pipeline, samples, str(tmp_path)):
        for got, expected in zip(rows, wanted_rows, strict=True):
            assert got == pytest.approx(expected, rel=1e-3, abs=1e-5)
        gaps = [(weights[name] - value).square().mean().sqrt().item() for name, value in wanted.items()]
        assert max(gaps) < 0.02 * 1e-2  # of a learning rate, as in test_gradients


def saved_and_counted(folder: str, path: str) -> dict[str, int]:
    """Bytes of tensors that a rank makes for a checkpoint of two models: at most, while it is written, at the end."""
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from oreal_megatron.mcore import optimizer_state, parallel
    from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver

    optimizer_state.BLOCK = 1000  # blocks are on the device, here the host, and small against a real model

    class Held(TorchDispatchMode):
        now = most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            given = storages((args, kwargs))
            for key, storage in storages(result).items():
                if key not in given:
                    self._count(storage.nbytes())
                    weakref.finalize(storage, self._count, -storage.nbytes())
            return result

        def _count(self, size: int) -> None:
            self.now += size
            self.most = max(self.most, self.now)

    def storages(tree) -> dict:
        tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
        return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}

    parallel.start_process_group()
    parallel.start_megatron(pieces(folder, 1)[1].parallel, seed=0)
    saver = CheckpointSaver(Path(path), trainers(folder, 1, 1, "bfloat16")[0], keep=1)
    with Held() as held:
        saver.start(1)
    counted = {"most": held.most, "pending": held.now}
    saver.finish()
    parallel.stop()
    return counted | {"left": held.now}


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.full), 2])
def test_planned_host_memory_is_that_of_a_checkpoint(processes, model_folder, in_processes, tmp_path):
    from oreal_megatron.plan import gpus, memory
    from oreal_megatron.plan.scenario import Scenario

    architecture, config, _ = pieces(str(model_folder), 1, 1, "bfloat16")
    case = Scenario(config, architecture, gpus.find_gpu("h100-80g"), processes)
    counted = in_processes(processes, saved_and_counted, str(model_folder), str(tmp_path))
    planned = memory.host_bytes(case)["gathering a checkpoint"]
    assert sum(rank["most"] for rank in counted) == pytest.approx(planned, rel=0.01)
    held = 14 * (case.elements(0, "lm") + case.elements(0, "scalar"))  # weights, main weights and moments, once
    assert [rank["pending"] for rank in counted] == pytest.approx([held, 0][:processes], rel=0.02, abs=0.02 * held)
    assert all(rank["left"] < 0.02 * held for rank in counted)


def test_only_what_training_goes_on_to_change_is_copied():
    from oreal_megatron.mcore import checkpoint_saver

    changing, copied = torch.zeros(3), torch.zeros(3)
    files = [("path", "key", ([], [("a", changing), ("b", copied)]))]
    ((_, _, (_, tensors)),) = checkpoint_saver._copied(files, {changing.untyped_storage()._cdata})
    assert tensors[0][1].data_ptr() != changing.data_ptr() and tensors[1][1] is copied


def save_beside_others(layout: tuple, path: str, cases: list[list[int]]) -> list[tuple[str, str]]:
    """Save while the disk is seen to have so much room, look by look, and then enough; what was said, what is wrong."""
    import contextlib
    import io

    from oreal_megatron.mcore import checkpoint_saver, parallel
    from oreal_megatron.runtime import checkpoint_folders, disk_space, files

    parallel.start_process_group()
    parallel.start_megatron(pieces(*layout)[1].parallel, seed=0)
    files.RETRY_S, looks = 0.01, []
    disk_space._free_bytes = lambda folder: looks.pop(0) if looks else 2**40
    saving, results = checkpoint_saver.CheckpointSaver(Path(path), trainers(*layout)[0], keep=1), []
    for step, free in enumerate(cases):
        looks[:] = free
        with contextlib.redirect_stderr(io.StringIO()) as said:
            saved = saving.save(step)
        results.append((said.getvalue(), str(checkpoint_folders.damage(saved) or "")))
    parallel.stop()
    return results


def test_a_disk_that_is_full_before_or_between_writing_is_waited_for(model_folder, in_processes, tmp_path):
    enough = 2**30
    cases = [[0, 0], [enough, 0, 0], [0, enough, 0], [enough, enough]]
    (results,) = in_processes(1, save_beside_others, (str(model_folder), 1), str(tmp_path), cases)
    for (said, damage), waits in zip(results, (1, 1, 2, 0), strict=True):
        assert said.count("waiting until there is space") == said.count("again; continuing") == waits and not damage


def load_foreign(folders: list[str], converted: str, path: str) -> dict[str, str]:
    """Why the first model's trainers cannot go on from sound checkpoints of others, or from parts of their own."""
    from oreal_megatron.config import ConfigError
    from oreal_megatron.mcore import checkpoint_state, parallel
    from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver

    parallel.start_process_group()
    parallel.start_megatron(pieces(folders[0], 1, 2)[1].parallel, seed=0)
    made = {Path(folder).name: trainers(folder, 1, 2, reward_model=False)[0] for folder in folders}
    own = made[Path(folders[0]).name]
    saved = {name: CheckpointSaver(Path(path) / name, models, keep=1).save(1) for name, models in made.items()}

    def refusal(where: Path, models: list[str]) -> str:
        try:
            step = checkpoint_state.load(checkpoint_state.choose(where, models, None, False), own)
        except ConfigError as error:
            return str(error)
        return f"step {step}"

    told = {name: refusal(where.parent, ["policy"]) for name, where in saved.items()}
    told["reward model"] = refusal(saved["own"].parent, ["policy", "reward_model"])
    if parallel.packing_spec(1).rank == 0 and parallel.replica_share():
        (saved["own"] / "policy/common.pt").write_bytes((Path(converted) / "common.pt").read_bytes())
    torch.distributed.barrier()
    for name, where in {"nothing common": saved["own"] / "policy", "weights alone": Path(converted)}.items():
        try:
            checkpoint_state._load(where, own["policy"])
        except ConfigError as error:
            told[name] = str(error)
    parallel.stop()
    return told


def test_sound_checkpoints_that_do_not_fit_are_told_in_a_sentence(write_model, in_processes, tmp_path):
    from oreal_megatron.config import ParallelConfig
    from oreal_megatron.convert import stream, to_megatron
    from oreal_megatron.convert.hf_folder import HFFolder

    folders = [
        write_model(tmp_path / "own", "Qwen2"),
        write_model(tmp_path / "deeper", "Qwen2", num_hidden_layers=6),
        write_model(tmp_path / "unbiased", "Llama"),
        write_model(tmp_path / "normed", "Qwen3", head_dim=16),
    ]
    converted = tmp_path / "converted"
    to_megatron.convert(HFFolder(folders[0]), converted, ParallelConfig(), stream.Cast(None), print, lambda count: None)
    saved = str(tmp_path / "saved")
    for told in in_processes(2, load_foreign, folders, str(converted), saved):
        assert told.pop("own") == "step 1"
        assert told.pop("reward model").endswith("contains no reward_model: the run that saved it did not train one")
        wanted = {
            "deeper": "has shape (6, 64), expected (4, 64)",
            "unbiased": "it has no decoder.layers.self_attention.linear_qkv.bias",
            "normed": "it has no decoder.layers.self_attention.linear_qkv.bias",
            "nothing common": "it has no step",
            "weights alone": "it has no optimizer.state.param.",
        }
        assert told.keys() == wanted.keys()
        for name, sentence in told.items():
            assert wanted[name] in sentence and f"is not a checkpoint of {folders[0]}" in sentence, sentence
