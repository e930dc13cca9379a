"""Hugging Face -> Megatron shards -> Hugging Face, with a different integer in every element: any swap shows.

One row of tests/families.json describes a family; names and shapes come from transformers where it has the family.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oreal_megatron.config import ConfigError
from oreal_megatron.models import architecture, tensors, torch_dist_keys

ROWS = json.loads((Path(__file__).parent.parent / "families.json").read_text())
IN_TRANSFORMERS = [name for name in ROWS if not name.startswith("InternLM")]
LAYOUTS = list(itertools.product((1, 2, 4), (1, 2), (1, 2)))  # tensor, pipeline, virtual


def saved_shapes(kind: type, hf: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the file that transformers writes; its mixtures have other names in memory."""
    with tempfile.TemporaryDirectory() as folder:
        kind.from_config(AutoConfig.for_model(**hf)).save_pretrained(folder)
        return {name: tuple(value.shape) for name, value in load_file(Path(folder) / "model.safetensors").items()}


def published_shapes(hf: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of InternLM's files, from its published description; transformers' own for the others."""
    if "auto_map" not in hf:
        return saved_shapes(AutoModelForCausalLM, hf)
    hidden, ffn, vocab = hf["hidden_size"], hf["intermediate_size"], hf["vocab_size"]
    d = hf.get("head_dim", hidden // hf["num_attention_heads"])
    q, kv = hf["num_attention_heads"] * d, hf["num_key_value_heads"] * d
    third = hf["model_type"] == "internlm3"
    if third:
        embedding, output, norms = "embed_tokens", "lm_head", ("input_layernorm", "post_attention_layernorm")
        layer = {f"self_attn.{x}_proj.weight": (rows, hidden) for x, rows in (("q", q), ("k", kv), ("v", kv))}
        layer |= {f"self_attn.{x}_proj.bias": (rows,) for x, rows in (("q", q), ("k", kv), ("v", kv))}
        layer |= {"self_attn.o_proj.weight": (hidden, q), "mlp.gate_proj.weight": (ffn, hidden)}
        layer |= {"mlp.up_proj.weight": (ffn, hidden), "mlp.down_proj.weight": (hidden, ffn)}
    else:
        embedding, output, norms = "tok_embeddings", "output", ("attention_norm", "ffn_norm")
        layer = {"attention.wqkv.weight": (q + 2 * kv, hidden), "attention.wo.weight": (hidden, q)}
        layer |= {"feed_forward.w1.weight": (ffn, hidden), "feed_forward.w3.weight": (ffn, hidden)}
        layer |= {"feed_forward.w2.weight": (hidden, ffn)}
    layer |= {f"{norm}.weight": (hidden,) for norm in norms}
    shapes = {f"model.{embedding}.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not hf["tie_word_embeddings"]:
        shapes[f"{output}.weight"] = (vocab, hidden)
    count = range(hf["num_hidden_layers"])
    return shapes | {f"model.layers.{i}.{name}": shape for i in count for name, shape in layer.items()}


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """A different integer in every element of all tensors (exact in float64)."""
    first = itertools.accumulate((torch.Size(shape).numel() for shape in shapes.values()), initial=0)
    return {
        name: torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float64).view(shape)
        for (name, shape), start in zip(shapes.items(), first, strict=False)
    }


def through(arch, weights: dict, tensor: int, stages: int, head: str = "lm") -> dict[str, torch.Tensor]:
    """HF -> full Megatron tensors -> every rank's shards -> HF."""
    back = {}
    for stage in range(stages):
        for entry in tensors.entries(arch, tensor, stages, stage, head):
            full = tensors.to_megatron(entry, arch, weights.__getitem__)
            assert full.shape == torch.Size(entry.shape), entry
            shards = [tensors.shard(entry, full, rank, tensor) for rank in range(tensor)]
            assert all(shard.shape == entry.shard_shape(tensor) for shard in shards), entry
            if entry.exported:
                for name, value in tensors.to_hf(entry, arch, tensors.unshard(entry, shards)).items():
                    assert name not in back, f"{name} is exported twice"
                    assert value.shape == tensors.hf_shapes(entry, arch)[name]
                    back[name] = value
    return back


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())


@pytest.mark.parametrize("kv_groups", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ROWS)
def test_the_round_trip_is_exact_at_every_layout(family, tied, kv_groups):
    hf = ROWS[family] | {"tie_word_embeddings": tied, "num_key_value_heads": kv_groups}
    arch, weights = architecture.read(hf), filled(published_shapes(hf))
    for tensor, pipeline, virtual in LAYOUTS:
        if virtual == 1 or pipeline > 1:
            arch.check_layout(tensor, pipeline, virtual)
            assert equal(through(arch, weights, tensor, pipeline * virtual), weights)


@pytest.mark.parametrize("swap", [("q", "k"), ("k", "v"), ("gate", "up")])
def test_a_swap_on_the_way_in_shows(swap):
    hf = ROWS["Qwen2"] | {"tie_word_embeddings": False, "num_key_value_heads": 4}  # query, key and value alike in size
    arch, weights = architecture.read(hf), filled(published_shapes(hf))
    one, other = (f"{name}_proj" for name in swap)

    def swapped(name: str) -> torch.Tensor:
        return weights[name.replace(one, "?").replace(other, one).replace("?", other)]

    back = {}
    for entry in tensors.entries(arch, 1, 1, 0, "lm"):
        back |= tensors.to_hf(entry, arch, tensors.to_megatron(entry, arch, swapped))
    assert back.keys() == weights.keys() and not equal(back, weights)


def example(kv_groups: int = 2, tied: bool = False):
    hf = ROWS["Qwen2"] | {"tie_word_embeddings": tied, "num_key_value_heads": kv_groups, "vocab_size": 100}
    return architecture.read(hf), filled(published_shapes(hf))


def test_a_rank_holds_whole_query_groups_and_matching_gate_and_up_rows():
    a, weights = example()
    by_name = {entry.megatron: entry for entry in tensors.entries(a, 2, 1, 0, "lm")}
    qkv = by_name["decoder.layers.1.self_attention.linear_qkv.weight"]
    second = tensors.shard(qkv, tensors.to_megatron(qkv, a, weights.__getitem__), 1, 2)
    q, k, v = (weights[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    assert torch.equal(second, torch.cat([q[32:], k[16:], v[16:]]))  # group 1: two query heads of 16, its key, value
    fc1 = by_name["decoder.layers.1.mlp.linear_fc1.weight"]
    first = tensors.shard(fc1, tensors.to_megatron(fc1, a, weights.__getitem__), 0, 2)
    gate, up = (weights[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(first, torch.cat([gate[:48], up[:48]]))


@pytest.mark.parametrize(("family", "block", "names"), [
    ("Qwen3Moe", "mlp.experts.2.{}_proj.weight", ("gate", "up", "down")),
    ("Mixtral", "block_sparse_moe.experts.2.{}.weight", ("w1", "w3", "w2")),
])  # fmt: skip
def test_a_rank_holds_matching_rows_and_columns_of_every_expert(family, block, names):
    hf = ROWS[family] | {"tie_word_embeddings": False}
    a, weights = architecture.read(hf), filled(published_shapes(hf))
    by_name = {entry.megatron: entry for entry in tensors.entries(a, 2, 1, 0, "lm")}
    gate, up, down = (weights["model.layers.1." + block.format(name)] for name in names)

    def second(name: str) -> torch.Tensor:
        entry = by_name["decoder.layers.1.mlp." + name]
        return tensors.shard(entry, tensors.to_megatron(entry, a, weights.__getitem__), 1, 2)

    half = a.ffn // 2
    assert torch.equal(second("experts.local_experts.2.linear_fc1.weight"), torch.cat([gate[half:], up[half:]]))
    assert torch.equal(second("experts.local_experts.2.linear_fc2.weight"), down[:, half:])
    assert second("router.weight").shape == (a.experts.count, a.hidden)


def test_vocabulary_is_padded_for_every_rank_alike_and_padding_never_leaves():
    a, weights = example()
    assert [a.padded_vocab(tensor) for tensor in (1, 2, 4)] == [128, 128, 256]
    entry = next(tensors.entries(a, 2, 1, 0, "lm"))
    full = tensors.to_megatron(entry, a, weights.__getitem__)
    assert full.shape[0] == 128 and not full[100:].any()
    assert tensors.to_hf(entry, a, full)["model.embed_tokens.weight"].shape[0] == 100


def test_the_last_stage_of_a_tied_model_is_filled_but_neither_exported_nor_stored_twice():
    last = list(tensors.entries(example(tied=True)[0], 1, 2, 1, "lm"))[-1]
    assert last.hf == ("model.embed_tokens.weight",) and not last.exported
    assert torch_dist_keys.stored_tensor(last) == ("embedding.word_embeddings.weight", ())


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_reward_model_has_a_scalar_head_and_transformers_names(family, tied):
    hf = architecture.with_head(ROWS[family] | {"tie_word_embeddings": tied}, "scalar")
    assert architecture.head(hf) == "scalar"
    shapes = saved_shapes(AutoModelForTokenClassification, hf)
    assert shapes.pop("score.bias") == (1,)  # zeros, which the exporter adds
    weights = filled(shapes)
    assert equal(through(architecture.read(hf), weights, 2, 2, "scalar"), weights)
    assert architecture.with_head(hf, "lm")["architectures"] == [family + "ForCausalLM"]


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0,
         "original_max_position_embeddings": 100},
    ],
)  # fmt: skip
def test_rotary_frequencies_are_those_of_transformers(scaling):
    hf = ROWS["Llama"] | {"head_dim": 128, "rope_theta": 500000.0, "rope_scaling": scaling}
    config = AutoConfig.for_model(**hf)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        wanted = 1.0 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    else:
        wanted, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=hf["max_position_embeddings"])
    got = architecture.read(hf).rope.frequencies(128)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


UNSUPPORTED = [
    ("Qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("Qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ("Qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
    ("Qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "rope type 'mrope'"),
    ("Qwen2", {"num_key_value_heads": None}, "num_key_value_heads"),
    ("Qwen3", {"attention_bias": True}, "attention_bias = True"),
    ("Qwen3", {"head_dim": None}, "head_dim"),
    ("Qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("Llama", {"mlp_bias": True}, "mlp_bias = True"),
    ("Llama", {"pretraining_tp": 2}, "pretraining_tp = 2"),
    ("Llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("Llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("Llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
    ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 8.0, "attention_factor": 2.0}}, "attention_factor"),
    ("Llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("Llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0, which is unknown"),
    ("Mistral", {"sliding_window": 256}, "sliding_window is 256"),
    ("InternLM2", {"bias": True}, "bias = True"),
    ("InternLM3", {"bias": True}, "bias = True"),
    (
        "Qwen3",
        {"architectures": ["Qwen3MoeForCausalLM"], "model_type": None},
        "lacks the field 'moe_intermediate_size'",
    ),
    (
        "Qwen3",
        {"architectures": ["Qwen3MoeForCausalLM"]},
        "model_type 'qwen3', by which .* expected model_type 'qwen3_moe'",
    ),
    ("Qwen3", {"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM is not supported"),
    ("Qwen3Moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]; only \[\] is supported"),
    ("Qwen3Moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2; only 1 is supported"),
    ("Qwen3Moe", {"shared_expert_intermediate_size": 96}, "shared_expert_intermediate_size = 96; only 0 is supported"),
    ("Qwen3Moe", {"n_shared_experts": 1}, "n_shared_experts = 1; only 0 is supported"),
    ("Qwen3Moe", {"num_local_experts": 8}, "num_experts = 4 and num_local_experts = 8"),
    ("Qwen3Moe", {"num_experts": None}, "lacks the field 'num_experts'"),
    ("Qwen3Moe", {"norm_topk_prob": None}, "lacks the field 'norm_topk_prob'"),
    ("Qwen3Moe", {"num_experts_per_tok": 5}, "num_experts_per_tok = 5 of 4 experts"),
    ("Qwen3Moe", {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid', which is unknown for this model family"),
    ("Mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1 with normalised weights"),
    ("Mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
    ("Mixtral", {"sliding_window": 256}, "sliding_window is 256"),
    ("Qwen3", {"num_experts": 4}, "num_experts = 4, which is unknown for this model family"),
    ("InternLM3", {"architectures": ["InternLM9ForCausalLM"]}, "InternLM9ForCausalLM is not supported"),
    ("Qwen2", {"architectures": ["Qwen2ForTokenClassification"], "id2label": {"0": "A", "1": "B"}}, "several labels"),
    ("Qwen2", {"architectures": ["Qwen2ForTokenClassification"]}, "several labels"),  # transformers' default is two
]


@pytest.mark.parametrize(("family", "change", "sentence"), UNSUPPORTED, ids=[row[2] for row in UNSUPPORTED])
def test_what_is_not_supported_is_rejected_by_name(family, change, sentence):
    architecture.read(ROWS[family])
    with pytest.raises(ConfigError, match=sentence):
        architecture.read({key: value for key, value in (ROWS[family] | change).items()})


def test_a_mistral_without_a_word_about_its_window_has_transformers_window():
    silent = {key: value for key, value in ROWS["Mistral"].items() if key != "sliding_window"}
    architecture.read(silent)  # 512 positions fit the window of 4096
    with pytest.raises(ConfigError, match="sliding_window is 4096"):
        architecture.read(silent | {"max_position_embeddings": 8192})


def test_transformers_5_writes_another_name_for_the_number_of_experts():
    written = AutoConfig.for_model(**ROWS["Qwen3Moe"]).to_dict()
    assert "num_experts" not in written and written["num_local_experts"] == 4
    assert architecture.read(ROWS["Qwen3Moe"] | written) == architecture.read(ROWS["Qwen3Moe"])


def test_a_mixtral_without_a_word_about_rope_and_norm_has_transformers_values():
    silent = {key: value for key, value in ROWS["Mixtral"].items() if key not in ("rope_theta", "rms_norm_eps")}
    expected, arch = AutoConfig.for_model(**silent), architecture.read(silent)
    assert (arch.rope.theta, arch.norm_epsilon) == (expected.rope_parameters["rope_theta"], expected.rms_norm_eps)
    assert arch.norm_epsilon != architecture.read(ROWS["Qwen3Moe"]).norm_epsilon


def test_layouts_that_cannot_be_split_are_rejected():
    arch = example(kv_groups=2)[0]
    arch.check_layout(4, 2, 2)
    for layout, sentence in (((3, 1, 1), "attention heads"), ((1, 3, 1), "layers"), ((1, 1, 2), "at least 2"),
                             ((1, 2, 4), "chunks")):  # fmt: skip
        with pytest.raises(ConfigError, match=sentence):
            arch.check_layout(*layout)
    mixture = architecture.read(ROWS["Mixtral"])
    mixture.check_training(1, sequence=False)
    mixture.check_training(2, sequence=True)
    with pytest.raises(ConfigError, match="parallel.tensor is 2, but Megatron-core trains mixtures of experts"):
        mixture.check_training(2, sequence=False)
    with pytest.raises(ConfigError, match="3 key-value groups"):
        architecture.read(ROWS["Qwen2"] | {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 16}) \
            .check_layout(2, 1)  # fmt: skip
