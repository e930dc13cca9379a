"""The layers of Transformer Engine through Megatron's own specification, with stand-ins for its modules, because it
does not run here: the same parameters under its names, the same numbers, and checkpoints that either kind of layer
reads.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

FAMILIES = {"Qwen2": dict(tensor=2, sequence=True), "Qwen3": dict(tensor=2), "Qwen3Moe": {}}
KINDS = ("local", "transformer_engine")


def stand_in() -> None:
    """Modules with Transformer Engine's parameters and arguments, made of Megatron's and torch's."""
    import torch.nn.functional as F
    from megatron.core.extensions import transformer_engine
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel import ColumnParallelLinear

    class NormedLinear(ColumnParallelLinear):
        def __init__(self, width: int, *sizes, config, **more):
            super().__init__(width, *sizes, config=config, **more)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(width))
            self.layer_norm_weight.sequence_parallel = config.sequence_parallel

        def forward(self, rows):
            norm = F.rms_norm(rows, rows.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon)
            return super().forward(norm)

    class Attention(torch.nn.Module):
        def __init__(self, *arguments, **more):
            super().__init__()

        def forward(self, query, key, value, mask, attn_mask_type, attention_bias=None, packed_seq_params=None):
            assert packed_seq_params.qkv_format == "thd" and query.dim() == 3 and attn_mask_type.name == "causal"
            assert packed_seq_params.max_seqlen_q == packed_seq_params.cu_seqlens_q.diff().max()
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            each = zip(*(rows.transpose(0, 1).split(lengths, 1) for rows in (query, key, value)), strict=True)
            attended = [F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True) for parts in each]
            return torch.cat(attended, 1).transpose(0, 1).flatten(1)

    class Provider(LocalSpecProvider):
        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> type:
            return NormedLinear

    transformer_engine.TEDotProductAttention = Attention
    gpt_layer_specs.TESpecProvider, gpt_layer_specs.HAVE_TE = Provider, True


def every_family(folders: dict[str, str], samples: list, scratch: str) -> dict:
    from megatron.core import parallel_state

    from oreal_megatron.config import ParallelConfig
    from oreal_megatron.mcore import parallel

    stand_in()
    parallel.start_process_group()
    found = {}
    for family, folder in folders.items():
        parallel.start_megatron(ParallelConfig(**FAMILIES[family]), seed=0)
        found[family] = both_kinds(folder, samples, ParallelConfig(**FAMILIES[family]), Path(scratch) / family)
        parallel_state.destroy_model_parallel()
    parallel.start_megatron(ParallelConfig(), seed=0)
    parallel.stop()
    return found


def both_kinds(folder: str, samples: list, layout, scratch: Path) -> dict:
    """A step, a checkpoint and a step of each kind; and the second step of either kind from the other's checkpoint."""
    from oreal_megatron import config as c
    from oreal_megatron.algo import packing
    from oreal_megatron.convert import torch_dist
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import checkpoint_state, parallel, trained_models
    from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver
    from oreal_megatron.models import architecture
    from oreal_megatron.reshard.weight_sync import full_tensors

    source, found, saved = HFFolder(folder), {}, {}
    arch = architecture.read(source.config)

    def policy(kind: str) -> trained_models.Policy:
        model = c.ModelConfig(folder, layers=kind)
        config = c.Config(model=model, parallel=layout, optimizer=c.OptimizerConfig(lr=1e-2, warmup_steps=0))
        return trained_models.Policy(arch, config, source.tensor)

    def step(trainer: trained_models.Policy) -> tuple[dict, dict]:
        _, metrics = trainer.imitate(batch)
        return metrics, {name: value.clone() for name, value in full_tensors(trainer)}

    batch = packing.batch(samples, parallel.packing_spec(60, arch))
    for kind in KINDS:
        trainer = policy(kind)
        first = step(trainer)
        saved[kind] = CheckpointSaver(scratch / kind, {"policy": trainer}, keep=1).save(0)
        names = {name for chunk in trainer.chunks for name, _ in chunk.named_parameters()}
        stored = set(torch_dist.TorchDistReader(saved[kind] / "policy").tensors)
        found[kind] = dict(names=names, stored=stored, first=first, second=step(trainer))
    for kind, other in (KINDS, KINDS[::-1]):
        trainer = policy(kind)
        checkpoint_state.load(saved[other], {"policy": trainer})
        loaded = {name: value.clone() for name, value in full_tensors(trainer)}
        found[kind] |= dict(loaded=loaded, third=step(trainer))
    return found


@pytest.fixture(scope="module")
def found(write_model, in_processes, tmp_path_factory) -> dict:
    from oreal_megatron.records import Sample

    root = tmp_path_factory.mktemp("families")
    folders = {name: write_model(root / name, name) for name in FAMILIES}
    samples = [Sample((5, 6), tuple(range(7, 9 + place)), 1.0, 1.0) for place in range(8)]
    return in_processes(2, every_family, folders, samples, str(root / "runs"))[0]


def close(one: tuple[dict, dict], other: tuple[dict, dict]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5, abs=1e-7)
    for name, value in one[1].items():  # Adam turns rounding of gradients near zero into whole steps of 0.01
        assert (other[1][name] - value).square().mean().sqrt() < 2e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_both_kinds_of_layers_compute_the_same_under_their_own_names(family, found):
    local, fused = (found[family][kind] for kind in KINDS)
    assert not any("layer_norm_weight" in name for name in local["names"])
    assert any(name.endswith("linear_qkv.layer_norm_weight") for name in fused["names"])
    assert not any(name.endswith("input_layernorm.weight") for name in fused["names"])
    close(local["first"], fused["first"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind, other", [KINDS, KINDS[::-1]], ids=KINDS)
def test_each_goes_on_from_the_checkpoint_of_the_other(family, kind, other, found):
    found = found[family]
    assert found[kind]["stored"] == found[other]["stored"]
    written = found[other]["first"][1]
    assert all(torch.equal(written[name], value) for name, value in found[kind]["loaded"].items())
    close(found[kind]["third"], found[other]["second"])


def test_without_transformer_engine_it_is_refused(write_model, tmp_path):
    from oreal_megatron import config as c
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import layer_spec
    from oreal_megatron.models import architecture

    arch = architecture.read(HFFolder(write_model(tmp_path / "model", "Qwen2")).config)
    with pytest.raises(c.ConfigError, match='model.layers is "transformer_engine", but .* set model.layers to "local"'):
        layer_spec.layer_spec(arch, c.Config(model=c.ModelConfig(layers="transformer_engine")))
