"""Real Megatron models filled from Hugging Face folders: the logits of transformers at every layout, and checkpoints
that go from one layout to another and to Hugging Face without a changed bit.

InternLM is not part of transformers: its oracle here is a small torch model written from the published description.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

ROWS = json.loads((Path(__file__).parent.parent / "families.json").read_text())
LENGTH = 300  # beyond the 64 positions at which the Llama of families.json begins to stretch its waves
LAYOUTS = {"one process": (1, (1, 1, 1)), "interleaved": (2, (1, 2, 2)), "more ranks than groups": (4, (4, 1, 1)),
           "tensor parallel": (2, (2, 1, 1))}  # fmt: skip
VOCABULARY = 130  # padded to 192 for one rank, to 256 for four


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A folder with random weights for every family, untied and tied, and reward models of three."""
    from oreal_megatron.models import architecture

    root, made = tmp_path_factory.mktemp("families"), {}
    for family, row in ROWS.items():
        made[family] = write(root / family, row | {"tie_word_embeddings": False})
        made[family + " tied"] = write(root / f"{family}_tied", row | {"tie_word_embeddings": True})
    made["Qwen3Moe as picked"] = write(root / "as_picked", ROWS["Qwen3Moe"] | {"norm_topk_prob": False})
    for family in ("Qwen2", "Qwen3Moe", "Mixtral"):
        made[family + " reward model"] = write(
            root / f"{family}_reward", architecture.with_head(ROWS[family], "scalar")
        )
    return made


def write(folder: Path, hf: dict) -> str:
    from oreal_megatron.models import architecture, tensors

    hf = hf | {"vocab_size": VOCABULARY}
    arch, weights, generator = architecture.read(hf), {}, torch.Generator().manual_seed(len(folder.name))
    for entry in tensors.entries(arch, 1, 1, 0, architecture.head(hf)):
        for name, shape in tensors.hf_shapes(entry, arch).items():
            drawn = torch.randn(shape, generator=generator)
            weights[name] = 1 + drawn / 10 if "norm" in name else drawn / 10
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf | {"torch_dtype": "float32"}))
    (folder / "tokenizer_config.json").write_text("{}")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(5))


def start(layout: tuple, dtype: str = "float32"):
    from oreal_megatron import config as c
    from oreal_megatron.mcore import parallel

    config = c.Config(model=c.ModelConfig(dtype=dtype), parallel=c.ParallelConfig(*layout))
    parallel.start_process_group()
    parallel.start_megatron(config.parallel, seed=0)
    return config


def outputs(folders: dict[str, str], layout: tuple) -> dict[str, torch.Tensor | None]:
    """Of each folder's model: [B, S, V/tp] logits of this rank, None before the last stage."""
    from oreal_megatron.algo import packing
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import gpt_model, output_heads, parallel, scorer
    from oreal_megatron.models import architecture
    from oreal_megatron.records import Sample

    config, results = start(layout), {}
    sequence = tokens()[0].tolist()
    batch = packing.batch([Sample(tuple(sequence[:-1]), (sequence[-1],), 1.0, 1.0)], parallel.packing_spec(LENGTH))
    for name, path in folders.items():
        source = HFFolder(path)
        arch, head = architecture.read(source.config), architecture.head(source.config)
        chunks = [chunk.eval() for chunk in gpt_model.build(arch, config, head)]
        gpt_model.load(chunks, arch, config, head, source.tensor)
        language_model = output_heads.LanguageModelHead(chunks[-1], arch.vocab, 0)
        read = language_model.logits if head == "lm" else torch.clone
        scored = scorer.MegatronScorer(chunks, lambda output, micro_batch, read=read: read(output)).score(batch)
        results[name] = scored and scored[0]
    parallel.stop()
    return results


@torch.no_grad()
def oracle(path: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    hf = json.loads((Path(path) / "config.json").read_text())
    if "auto_map" in hf:
        return internlm(hf, load_file(Path(path) / "model.safetensors"), tokens())
    token_scores = hf["architectures"][0].endswith("ForTokenClassification")
    kind = AutoModelForTokenClassification if token_scores else AutoModelForCausalLM
    return kind.from_pretrained(path, dtype=torch.float32).eval()(tokens()).logits


def internlm(hf: dict, w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """InternLM2 (wqkv: for each group its queries, key and value; w1 gate, w3 up, w2 down) and InternLM3 (Llama's
    layers with biases on query, key and value)."""
    second = hf["model_type"] == "internlm2"
    heads, groups = hf["num_attention_heads"], hf["num_key_value_heads"]
    d, each = hf.get("head_dim", hf["hidden_size"] // heads), heads // groups
    norm = functools.partial(rms_norm, epsilon=hf["rms_norm_eps"])
    x = w["model.tok_embeddings.weight" if second else "model.embed_tokens.weight"][ids]
    length = ids.shape[1]
    scaling = hf["rope_scaling"]
    # Dynamic scaling leaves positions alone up to max_position_embeddings, which these sequences do not reach.
    positions = torch.arange(length) / (scaling["factor"] if scaling.get("rope_type") == "linear" else 1.0)
    angles = torch.outer(positions, hf["rope_theta"] ** (-torch.arange(0, d, 2) / d)).repeat(1, 2)
    for layer in range(hf["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        y = norm(x, w[at + ("attention_norm" if second else "input_layernorm") + ".weight"])
        if second:
            qkv = F.linear(y, w[at + "attention.wqkv.weight"]).view(1, length, groups, each + 2, d)
            q, k, v = qkv[..., :each, :].reshape(1, length, heads, d), qkv[..., -2, :], qkv[..., -1, :]
        else:
            q, k, v = (F.linear(y, w[f"{at}self_attn.{p}_proj.weight"], w[f"{at}self_attn.{p}_proj.bias"])
                       .view(1, length, -1, d) for p in "qkv")  # fmt: skip
        q, k, v = rotated(q, angles), rotated(k, angles), v
        k, v = k.repeat_interleave(each, 2), v.repeat_interleave(each, 2)
        attended = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        out = attended.transpose(1, 2).reshape(1, length, heads * d)
        x = x + F.linear(out, w[at + ("attention.wo" if second else "self_attn.o_proj") + ".weight"])
        y = norm(x, w[at + ("ffn_norm" if second else "post_attention_layernorm") + ".weight"])
        gate, up, down = ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2") if second else \
                         ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
        y = F.silu(F.linear(y, w[at + gate + ".weight"])) * F.linear(y, w[at + up + ".weight"])
        x = x + F.linear(y, w[at + down + ".weight"])
    x = norm(x, w["model.norm.weight"])
    if hf["tie_word_embeddings"]:
        return F.linear(x, w["model.tok_embeddings.weight" if second else "model.embed_tokens.weight"])
    return F.linear(x, w["output.weight" if second else "lm_head.weight"])


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """[B, S, heads, d]: pairs are a dimension and the one half the width further."""
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return x * angles.cos()[None, :, None] + turned * angles.sin()[None, :, None]


def test_logits_are_those_of_transformers_at_every_layout(folders, in_processes):
    wanted = {name: oracle(path) for name, path in folders.items()}
    for case, (world, layout) in LAYOUTS.items():
        ranks = in_processes(world, outputs, folders, layout)
        last = [rank for rank in ranks if rank["Qwen2"] is not None]
        assert len(last) == layout[0]
        for name, logits in wanted.items():
            whole = last[0][name] if "reward model" in name else torch.cat([rank[name] for rank in last], -1)
            gap = (whole[..., : logits.shape[-1]] - logits).abs().max().item()
            assert logits.abs().max() > 0.5 and gap < 1e-5, f"{case}, {name}: {gap:.1e}"


def test_a_wrong_weight_would_show_in_the_logits(folders, tmp_path):
    """What the tolerance above can tell: two swapped rows of one key projection are far outside it."""
    source = Path(folders["InternLM3"])
    hf, weights = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    right = internlm(hf, weights, tokens())
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name] = weights[name][[1, 0, *range(2, len(weights[name]))]]
    assert (internlm(hf, weights, tokens()) - right).abs().max() > 1e-3


def models(folder: str, config, source) -> dict:
    from oreal_megatron.mcore import trained_models
    from oreal_megatron.models import architecture

    pieces = (architecture.read(source.config), config, source.tensor)
    return {"policy": trained_models.Policy(*pieces), "reward_model": trained_models.TokenRewardModel(*pieces)}


def save_trained(folder: str, layout: tuple, path: str, samples: list) -> dict[str, torch.Tensor]:
    """One step and a checkpoint; the policy's weights."""
    from oreal_megatron.algo import packing
    from oreal_megatron.convert import megatron_folder
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import parallel
    from oreal_megatron.mcore.checkpoint_saver import CheckpointSaver
    from oreal_megatron.reshard.weight_sync import full_tensors

    config, source = start(layout), HFFolder(folder)
    made = models(folder, config, source)
    batch = packing.batch(samples, parallel.packing_spec(200))
    made["reward_model"].update(batch)
    made["policy"].imitate(batch)

    def describe(name: str, where: Path) -> None:
        head = {"policy": "lm", "reward_model": "scalar"}[name]
        megatron_folder.describe(source, where, head, torch.float32)

    CheckpointSaver(Path(path), made, keep=1, describe=describe).save(1)
    weights = {name: tensor.clone() for name, tensor in full_tensors(made["policy"])}
    parallel.stop()
    return weights


def load_trained(folder: str, layout: tuple, path: str, converted: str) -> tuple[dict, dict]:
    """The policy's weights from a training checkpoint, and those of a converted one, through Megatron's own loader."""
    from megatron.core import dist_checkpointing

    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import checkpoint_state, parallel
    from oreal_megatron.mcore.megatron_patches import cpu_shim
    from oreal_megatron.reshard.weight_sync import full_tensors

    config, source = start(layout), HFFolder(folder)
    made = models(folder, config, source)
    checkpoint_state.load(Path(path) / "step_000001", made)
    trained = {name: tensor.clone() for name, tensor in full_tensors(made["policy"])}
    chunks = {f"chunk{number}": chunk.module for number, chunk in enumerate(made["policy"].chunks)}
    with cpu_shim():
        state = dist_checkpointing.load({name: chunk.sharded_state_dict() for name, chunk in chunks.items()}, converted)
        for name, chunk in chunks.items():
            chunk.load_state_dict(state[name])
    loaded = {name: tensor.clone() for name, tensor in full_tensors(made["policy"])}
    parallel.stop()
    return trained, loaded


def pieces(checkpoint: Path) -> set[tuple]:
    """Key and place of every piece of weight and of every other object, the optimizer's left out."""
    from oreal_megatron.convert.torch_dist import TorchDistReader

    return {
        (index.fqn, index.offset)
        for index in TorchDistReader(checkpoint).storage
        if not index.fqn.startswith("optimizer.")
    }


@pytest.mark.parametrize(
    ("family", "saved", "loaded"),
    [("Qwen3 tied", (4, 1, 1), (1, 2, 2)), ("Qwen2", (1, 2, 2), (4, 1, 1)), ("Qwen3Moe", (1, 2, 2), (2, 1, 1))],
)
def test_checkpoints_go_between_layouts_and_to_hugging_face(
    family, saved, loaded, folders, in_processes, make_samples, tmp_path
):
    from oreal_megatron.config import ParallelConfig
    from oreal_megatron.convert import stream, to_hf, to_megatron
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.convert.megatron_folder import MegatronFolder

    quiet, run, samples = (lambda *arguments: None), tmp_path / "run", make_samples(6, seed=3)
    trained = in_processes(math.prod(saved[:2]), save_trained, folders[family], saved, str(run), samples)[0]
    for name in ("policy", "reward_model"):
        exported = tmp_path / name
        to_hf.convert(MegatronFolder(run / "step_000001" / name), exported, stream.Cast(None), quiet, quiet)
    policy, reward_model = (load_file(tmp_path / name / "model.safetensors") for name in ("policy", "reward_model"))
    assert policy.keys() == trained.keys() and all(torch.equal(policy[name], value) for name, value in trained.items())
    before = load_file(Path(folders[family]) / "model.safetensors")
    assert not torch.equal(policy["model.norm.weight"], before["model.norm.weight"])  # it was trained
    assert reward_model["score.weight"].shape == (1, 64) and "lm_head.weight" not in reward_model

    source, converted = HFFolder(folders[family]), tmp_path / "converted"
    to_megatron.convert(source, converted, ParallelConfig(*saved), stream.Cast(None), quiet, quiet)
    assert pieces(converted) == pieces(run / "step_000001" / "policy")
    for again, filled in in_processes(
        math.prod(loaded[:2]), load_trained, folders[family], loaded, str(run), str(converted)
    ):
        assert all(torch.equal(again[name], value) for name, value in trained.items())
        assert filled.keys() == before.keys() and all(torch.equal(filled[name], before[name]) for name in before)


def imitated(folders: list[str], layout: tuple, samples: list) -> list[tuple[float, float]]:
    """Loss and gradient norm of a supervised step of each folder's model."""
    from oreal_megatron.algo import packing
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import parallel, trained_models
    from oreal_megatron.models import architecture

    config, results = start(layout), []
    batch = packing.batch(samples, parallel.packing_spec(60))
    for source in map(HFFolder, folders):
        metrics = trained_models.Policy(architecture.read(source.config), config, source.tensor).imitate(batch)[1]
        results.append((metrics["loss/total"], metrics["policy/gradient_norm"]))
    parallel.stop()
    return results


def imitated_by_transformers(folder: str, samples: list) -> tuple[float, float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = 0
    for sample in samples:
        ids = torch.tensor([sample.prompt_tokens + sample.response_tokens])
        logp = torch.log_softmax(model(ids).logits[0, :-1], -1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        total = total - logp[len(sample.prompt_tokens) - 1 :].sum()
    total = total / sum(len(sample.response_tokens) for sample in samples)
    total.backward()
    return total.item(), torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 2, 2)], ids=["data parallel", "interleaved"])
def test_a_mixture_has_the_gradient_of_transformers(layout, folders, in_processes, make_samples):
    paths = [folders[name] for name in ("Qwen3Moe", "Qwen3Moe as picked", "Mixtral tied")]
    samples = make_samples(4, seed=2)
    wanted = [imitated_by_transformers(path, samples) for path in paths]
    assert min(norm for _, norm in wanted) > 0.1
    for rank in in_processes(2, imitated, paths, layout, samples):
        for got, (loss, norm) in zip(rank, wanted, strict=True):
            assert got == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))


def logits_differences(folder: str, converted: str, other: str) -> list[str | None]:
    from oreal_megatron.convert import compare_checkpoints
    from oreal_megatron.session import compare_logits

    a, b, c = (compare_checkpoints.open_folder(path) for path in (folder, converted, other))
    return [compare_logits.difference(a, b, "1+2="), compare_logits.difference(b, c, "1+2=")]


def test_logits_are_compared_across_frameworks(model_folder, in_processes, tmp_path):
    """A Megatron checkpoint against its Hugging Face folder, and against one whose last norm is doubled."""
    import shutil

    from oreal_megatron.config import ParallelConfig
    from oreal_megatron.convert import stream, to_megatron
    from oreal_megatron.convert.hf_folder import HFFolder

    converted, other = tmp_path / "converted", tmp_path / "other"
    to_megatron.convert(HFFolder(model_folder), converted, ParallelConfig(2), stream.Cast(None), print, lambda n: None)
    shutil.copytree(model_folder, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    ((same, different),) = in_processes(1, logits_differences, str(model_folder), str(converted), str(other))
    assert same is None and "logits differ by" in different
