"""Every family through a real vLLM: after an update its engine holds, bit by bit, what vLLM's own loader would make of
the new weights, and answers with the log-probs of transformers on them.

All families: python -m pytest --full tests/engine/test_families.py
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

# Processes, trainer's (tensor, pipeline), ranks of a replica of the engine, key-value groups, tied.
CASES = {
    "Llama": (2, (2, 1), 2, 1, False),  # fewer groups than ranks on both sides
    "Qwen3": (1, (1, 1), 1, 2, True),
    "Mistral": (2, (1, 2), 2, 1, True),
    "InternLM2": (2, (1, 2), 2, 2, False),  # vLLM's own fails with more ranks than groups
    "InternLM3": (2, (2, 1), 2, 1, False),
    "Qwen2": (2, (1, 2), 2, 1, True),
}
FAMILIES = [name if name == "Llama" else pytest.param(name, marks=pytest.mark.full) for name in CASES]
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "head_dim": 32,
}  # vLLM takes no smaller
PROMPTS = [tuple(4 + (7 * i + 3 * j) % 190 for j in range(60 + i)) for i in range(3)]


class Tokenizer:
    def decode(self, tokens, **options) -> str:
        return ""


def story(folder: str, trainer: tuple[int, int], ranks: int, samples: list) -> dict:
    """An update sent by `direct`, responses, and whether vLLM's loader makes the same parameters."""
    from oreal_megatron import config as c
    from oreal_megatron.algo import packing
    from oreal_megatron.convert.hf_folder import HFFolder
    from oreal_megatron.mcore import parallel, trained_models
    from oreal_megatron.models import architecture
    from oreal_megatron.records import Prompt
    from oreal_megatron.reshard.weight_sync import full_tensors
    from oreal_megatron.rollout.engine import VllmEngine
    from oreal_megatron.session import policy_weights

    config = c.Config(
        model=c.ModelConfig(folder),
        parallel=c.ParallelConfig(*trainer),
        engine=c.EngineConfig(
            tensor=ranks, max_model_len=128, max_num_seqs=8, kv_cache_gib=0.05, enforce_eager=True, parity_rollouts=3
        ),
        sampling=c.SamplingConfig(rollouts_per_prompt=2, max_new_tokens=10),
        supervised=c.SupervisedConfig(optimizer=c.OptimizerConfig(lr=0.02, min_lr=0.02, warmup_steps=0)),
    )
    source = HFFolder(folder)
    arch = architecture.read(source.config)
    parallel.start_process_group()
    engine = VllmEngine(config, [arch.vocab - 1], Tokenizer())
    parallel.start_megatron(config.parallel, seed=0)
    policy = trained_models.Policy(arch, config, source.tensor)
    weight_sync = policy_weights.connect(policy, engine)
    policy.imitate(packing.batch(samples, parallel.packing_spec(4096)))
    metrics = weight_sync.sync(1)
    rollouts = engine.generate([Prompt(i, "", "", None, x) for i, x in enumerate(PROMPTS)], config.sampling, (0, 0))
    written = {name: tensor.clone() for name, tensor in engine.live()[0].items()}
    for tensor in engine.live()[0].values():
        tensor.zero_()
    engine.load(full_tensors(policy))
    engine.accept(1)
    loaded = {name: torch.equal(tensor, written[name]) for name, tensor in engine.live()[0].items()}
    weights = {name: tensor.clone() for name, tensor in full_tensors(policy)}
    parallel.stop(engine)
    answers = [(row[0].prompt.tokens, row[0].tokens, row[0].logprobs) for row in rollouts]
    return {"metrics": metrics, "loaded": loaded, "weights": weights, "answers": answers, "config": source.config}


@torch.no_grad()
def gap(hf: dict, weights: dict[str, torch.Tensor], answers: list) -> float:
    """Largest difference between vLLM's log-probs of its answers and those of transformers."""
    from transformers import AutoModelForCausalLM

    config, weights = as_transformers_knows_it(hf, weights)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name == "lm_head.weight" or "o_proj.bias" in name for name in missing)
    for name in missing:  # the first is tied, the second InternLM3 has not
        if "o_proj.bias" in name:
            model.get_parameter(name).zero_()
    worst = 0.0
    for prompt, tokens, logprobs in answers:
        ids = torch.tensor([[*prompt, *tokens]])
        logp = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        ours = logp.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, (ours - torch.tensor(logprobs)).abs().max().item())
    return worst


def as_transformers_knows_it(hf: dict, weights: dict[str, torch.Tensor]) -> tuple:
    """InternLM2 is Llama with query, key and value interleaved in one matrix, InternLM3 with biases on them."""
    from transformers import AutoConfig

    fields = {key: value for key, value in hf.items() if key not in ("model_type", "auto_map", "architectures")}
    if not hf["model_type"].startswith("internlm"):
        return AutoConfig.for_model(hf["model_type"], **fields), weights
    fields["attention_bias"] = bool(hf.get("qkv_bias"))
    if hf["rope_scaling"].get("type") == "dynamic":  # plain up to max_position_embeddings
        fields["rope_scaling"] = None
    names = {"tok_embeddings": "embed_tokens", "attention_norm": "input_layernorm", "attention.wo": "self_attn.o_proj",
             "ffn_norm": "post_attention_layernorm", "feed_forward.w1": "mlp.gate_proj", "output.": "lm_head.",
             "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj"}  # fmt: skip
    groups, renamed = hf["num_key_value_heads"], {}
    for name, tensor in weights.items():
        if "wqkv" in name:
            each = hf["num_attention_heads"] // groups * hf["head_dim"]
            parts = tensor.unflatten(0, (groups, -1)).split([each, hf["head_dim"], hf["head_dim"]], 1)
            for x, part in zip("qkv", parts, strict=True):
                renamed[name.replace("attention.wqkv", f"self_attn.{x}_proj")] = part.flatten(0, 1)
            continue
        for old, new in names.items() if hf["model_type"] == "internlm2" else ():
            name = name.replace(old, new)
        renamed[name] = tensor
    return AutoConfig.for_model("llama", **fields), renamed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_policy_reaches_vllm_slice_by_slice(family, in_processes, make_samples, write_model, tmp_path):
    world, trainer, ranks, groups, tied = CASES[family]
    sizes = SIZES | {"num_key_value_heads": groups, "tie_word_embeddings": tied}
    folder = write_model(tmp_path / family, family, **sizes)
    for result in in_processes(world, story, folder, trainer, ranks, make_samples(6, seed=4, vocabulary=200)):
        metrics = result["metrics"]
        assert metrics["weight_sync/direct"] == 1 and metrics["weight_sync/verified_parameters"] == len(
            result["loaded"]
        )
        assert metrics["weight_sync/received_bytes"] == metrics["weight_sync/least_received_bytes"]
        assert all(result["loaded"].values()), [name for name, equal in result["loaded"].items() if not equal]
        assert gap(result["config"], result["weights"], result["answers"]) < 1e-4
        assert gap(result["config"], load_file(f"{folder}/model.safetensors"), result["answers"]) > 0.1, (
            "it has changed"
        )
