"""Real runs of `oreal doctor` on a model of 0.4 M weights: a collective, generation, one update, a weight sync.

real_run_launcher.py starts it with torchrun, so that a crash is only reported. The argument is the model folder; the
first rank prints one line for each part that succeeded.
"""

from __future__ import annotations

import math
import string
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from oreal_megatron import loop
from oreal_megatron.algo import packing
from oreal_megatron.config import Config, EngineConfig, ModelConfig, SamplingConfig, VerifyConfig
from oreal_megatron.protocols import PolicyTrainer, RewardModelTrainer
from oreal_megatron.records import PackingSpec, Prompt, Rollout, Sample
from oreal_megatron.runtime import distributed
from oreal_megatron.session import policy_weights
from oreal_megatron.session.inputs import read_inputs
from oreal_megatron.session.session import Session

PARTS = ("collective", "generate", "train", "weight sync")
PREFIX = "doctor: "


def make_model(folder: Path) -> None:
    """Write a Qwen2 with random weights, and a tokenizer with one token per character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    characters = ["<end>", *string.ascii_lowercase, *string.digits, *"+=\\{}"]
    words = Tokenizer(models.WordLevel({text: number for number, text in enumerate(characters)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    shape = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4)
    config = Qwen2Config(
        vocab_size=64, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=0, **shape
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def run(folder: str) -> None:
    """Run all parts with the model of a folder. Collective."""
    from oreal_megatron.mcore import parallel, trained_models

    config = Config(
        tokens_per_micro_batch=512,
        model=ModelConfig(folder, dtype="bfloat16" if torch.cuda.is_available() else "float32"),
        engine=EngineConfig(max_model_len=32, max_num_seqs=16, kv_cache_gib=0.1, enforce_eager=True),
        sampling=SamplingConfig(rollouts_per_prompt=4, top_p=1.0, max_new_tokens=8),
        verify=VerifyConfig(workers=1),
    )
    inputs = read_inputs(config)
    with Session(config) as session:
        with part("collective") as report:
            report(collective())
        with part("generate") as report:
            engine, _ = session.start_engine(inputs)
            prompts = [Prompt(number, "", "", None, (number + 1, 2, 3)) for number in range(2 * engine.replicas)]
            rollouts = engine.generate(prompts, config.sampling, (0, 0))
            report(f"{sum(map(len, rollouts))} responses from {engine.replicas} engines")
        with part("train") as report:
            session.start_megatron()
            policy = trained_models.Policy(inputs.arch, config, inputs.folder.tensor)
            spec = parallel.packing_spec(config.tokens_per_micro_batch, inputs.arch)
            gap = loop.check_logprob_parity(config, engine, policy, rollouts, spec, 0)["parity/logprob_gap"]
            update = train(policy, trained_models.NoRewardModel(config), rollouts, spec)
            report(f"{update}; engine and trainer agree to {gap:.0e}")
        with part("weight sync") as report:
            metrics = policy_weights.connect(policy, engine).sync(policy.updates)
            report(f"{metrics['weight_sync/verified_parameters']:.0f} parameters verified")


def collective() -> str:
    """Sum a tensor over all ranks on their devices; raise RuntimeError if the sum is wrong."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    ones = torch.ones(2**22, device=device)
    dist.all_reduce(ones)
    if ones.min().item() != ones.max().item() or ones[0].item() != dist.get_world_size():
        raise RuntimeError(f"the sum of ones over {dist.get_world_size()} ranks is {ones[0].item()}")
    return f"{dist.get_world_size()} ranks on {device.type}"


def train(
    policy: PolicyTrainer, no_reward_model: RewardModelTrainer, rollouts: list[list[Rollout]], spec: PackingSpec
) -> str:
    """Update once on the rollouts, every second one taken as correct; raise RuntimeError if there is no gradient."""
    samples = [
        Sample(rollout.prompt.tokens, rollout.tokens, reward, reward)
        for row in rollouts
        for rollout, reward in zip(row, (1.0, -1.0) * 2, strict=True)
    ]
    batch = packing.batch(samples, spec)
    metrics = policy.update(batch, policy.score(batch), no_reward_model.update(batch)[0])
    if not (math.isfinite(metrics["policy/gradient_norm"]) and metrics["policy/gradient_norm"] > 0):
        raise RuntimeError(f"the gradient norm of one update is {metrics['policy/gradient_norm']}")
    return f"gradient norm {metrics['policy/gradient_norm']:.3f}"


@contextmanager
def part(name: str) -> Iterator[Callable[[str], None]]:
    """Time one part, and print what it reported once it has succeeded."""
    start, details = time.perf_counter(), list[str]()
    yield details.append
    if distributed.rank() == 0:
        print(f"{PREFIX}{name}: {', '.join(details)} ({time.perf_counter() - start:.1f} s)", flush=True)


if __name__ == "__main__":
    run(sys.argv[1])
