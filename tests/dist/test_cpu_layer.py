"""Each stand-in of megatron_patches.py is needed: without it, a piece of real Megatron fails here. A row that
passes without its patch tells that Megatron has moved and the patch can go."""

from __future__ import annotations

import traceback

from oreal_megatron.mcore.megatron_patches import CPU_PATCHES
from oreal_megatron.records import PackingSpec

TIED = "Tensor.cuda"  # only called for a tied embedding on two pipeline stages
# Without these nothing fails, but Megatron draws from the global generator.
SILENT = ["manual_seed", "_set_cuda_rng_state"]


def train_without(folder: str, samples: list, patches: list[str]) -> dict[str, str]:
    """Build, score, train and save in one process with one patch left out at a time; what failed, and where."""
    import tempfile
    from pathlib import Path

    from oreal_megatron import config as c
    from oreal_megatron.algo import packing
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import checkpoint_state, parallel, trained_models
    from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver
    from oreal_megatron.mcore.megatron_patches import cpu_shim
    from oreal_megatron.models import architecture

    source = HFFolder(folder)
    recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    arch, config = architecture.read(source.config), c.Config(model=c.ModelConfig(folder), megatron=recompute)
    batch = packing.batch(samples, PackingSpec(1000))
    parallel.start_process_group()

    def everything() -> None:
        parallel.start_megatron(config.parallel, seed=0)
        policy = trained_models.Policy(arch, config, source.tensor)
        policy.score(batch)
        policy.imitate(batch)
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint_state.load(
                CheckpointSaver(Path(scratch), {"policy": policy}, keep=1).save(1), {"policy": policy}
            )

    failures = {}
    for patch in patches:
        try:
            with cpu_shim(without=patch):
                everything()
        except Exception:
            failures[patch] = traceback.format_exc()
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return failures


def test_every_stand_in_is_needed(model_folder, in_processes, make_samples):
    patches = [*(name for name in CPU_PATCHES if name not in [*SILENT, TIED]), "none of them"]
    failures = in_processes(1, train_without, str(model_folder), make_samples(2), patches)[0]
    assert "none of them" not in failures, failures.get("none of them")
    not_needed = [patch for patch in patches[:-1] if patch not in failures]
    assert not not_needed, f"Megatron no longer needs the stand-ins for {', '.join(not_needed)}"
    assert all("/megatron/core/" in text for text in failures.values())


def build_tied(folder: str, without: str | None) -> str:
    """Build a tied policy on two pipeline stages; where that failed."""
    from oreal_megatron import config as c
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import gpt_model, parallel
    from oreal_megatron.mcore.megatron_patches import cpu_shim
    from oreal_megatron.models import architecture

    config = c.Config(parallel=c.ParallelConfig(pipeline=2))
    parallel.start_process_group()
    parallel.start_megatron(config.parallel, seed=0)
    try:
        with cpu_shim(without=without):
            gpt_model.build(architecture.read(HFFolder(folder).config), config, "lm")
        return ""
    except AssertionError:
        return traceback.format_exc()


def test_tied_embeddings_on_two_stages_need_their_stand_in(tied_model_folder, in_processes):
    assert in_processes(2, build_tied, str(tied_model_folder), None) == ["", ""]
    assert all("/megatron/core/" in text for text in in_processes(2, build_tied, str(tied_model_folder), TIED))


def draws(without: str | None) -> tuple[bool, bool]:
    """Whether Megatron's random-number tracker draws by its own seed, and leaves the global generator alone."""
    import torch
    from megatron.core import tensor_parallel

    from oreal_megatron.config import ParallelConfig
    from oreal_megatron.mcore import parallel
    from oreal_megatron.mcore.megatron_patches import cpu_shim

    parallel.start_process_group()
    parallel.start_megatron(ParallelConfig(), seed=0)

    def seeded(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(123)
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        torch.manual_seed(123)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            inside = torch.rand(4)
        return inside, torch.rand(4)

    with cpu_shim(without=without):
        one, outside = seeded(1)
        other, outside_again = seeded(2)
    torch.manual_seed(123)
    untouched = torch.equal(outside, torch.rand(4)) and torch.equal(outside, outside_again)
    parallel.stop()
    return not torch.equal(one, other), untouched


def test_megatron_s_random_numbers_follow_its_seed_and_nobody_else_s(in_processes):
    assert in_processes(1, draws, None)[0] == (True, True)
    for patch in SILENT:
        assert in_processes(1, draws, patch)[0] != (True, True), patch
