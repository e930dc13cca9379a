"""Real runs of `oreal doctor` on a model of 0.8 M weights: what two steps of a training run use on this machine.

A collective, generation, an update, a weight sync, and a second step after it. On GPUs with CUDA graphs, offloaded
models, an engine that sleeps twice, and tensor parallelism of 2 where the GPUs are even in number. On CPUs, which have
neither graphs nor a sleep mode, the same calls.

real_run_launcher.py starts it with torchrun, so that a crash is only reported. The argument is the model folder; the
first rank prints one line for each part that succeeded.
"""

from __future__ import annotations

import math
import os
import string
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from oreal_megatron import loop
from oreal_megatron.algo import packing
from oreal_megatron.config import (
    Config,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SamplingConfig,
    VerifyConfig,
)
from oreal_megatron.protocols import PolicyTrainer, RewardModelTrainer, RolloutEngine, WeightReceiver
from oreal_megatron.records import PackingSpec, Prompt, Rollout, Sample
from oreal_megatron.runtime import distributed, rollout_exchange
from oreal_megatron.session import policy_weights
from oreal_megatron.session.inputs import Inputs, read_inputs
from oreal_megatron.session.session import Session

PARTS = ("collective", "generate", "train", "weight sync", "second step")
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
    shape = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    config = Qwen2Config(
        vocab_size=64, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=0, **shape
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def run_config(folder: str, gpus: int) -> Config:
    """Return the recipe of the runs: that of a training run in small, as far as this machine's GPUs allow."""
    tensor = 2 if gpus and gpus % 2 == 0 else 1
    return Config(
        tokens_per_micro_batch=512,
        offload=True,
        model=ModelConfig(folder, dtype="bfloat16" if gpus else "float32"),
        parallel=ParallelConfig(tensor=tensor, sequence=tensor > 1),
        engine=EngineConfig(
            tensor=tensor,
            max_model_len=32,
            max_num_seqs=16,
            kv_cache_gib=0.1,
            enforce_eager=not gpus,
            vllm={"cudagraph_capture_sizes": [1, 8]} if gpus else {},  # few, because each takes time to capture
        ),
        sampling=SamplingConfig(rollouts_per_prompt=4, top_p=1.0, max_new_tokens=8),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-3, warmup_steps=0),  # one update changes weights in bfloat16 too
        verify=VerifyConfig(workers=1),
    )


def run(folder: str) -> None:
    """Run all parts with the model of a folder. Collective."""
    gpus = int(os.environ["WORLD_SIZE"]) if torch.cuda.is_available() else 0
    inputs = read_inputs(run_config(folder, gpus))
    with Session(inputs.config) as session:
        run_parts(session, inputs)


def run_parts(session: Session, inputs: Inputs) -> None:
    """Run the parts in the order of a training run, in a session that has begun. Collective."""
    from oreal_megatron.mcore import parallel, trained_models

    config = inputs.config
    with part("collective") as report:
        report(collective())
    with part("generate") as report:
        engine, _ = session.start_engine(inputs)
        prompts = [Prompt(number, "", "", None, (number + 1, 2, 3)) for number in range(2 * engine.replicas)]
        rollouts = engine.generate(prompts, config.sampling, (0, 0))
        starting_weights = fingerprint(engine)
        report(f"{sum(map(len, rollouts))} responses from {engine.replicas} engines")
    with part("train") as report:
        session.start_megatron()  # the engine sleeps
        naps = int(not engine.awake)
        policy = trained_models.Policy(inputs.arch, config, inputs.folder.tensor)
        spec = parallel.packing_spec(config.tokens_per_micro_batch, inputs.arch)
        trial = Trial(config, engine, policy, trained_models.NoRewardModel(config), spec)
        gap = trial.compare(rollouts, 0)
        report(f"gradient norm {trial.update(rollouts):.3f}; engine and trainer agree to {gap:.0e}")
    with part("weight sync") as report:
        weight_sync = policy_weights.connect(policy, engine)
        metrics = weight_sync.sync(policy.updates)
        weights = require_change(starting_weights, fingerprint(engine))
        report(f"{metrics['weight_sync/verified_parameters']:.0f} parameters verified")
    with part("second step") as report:
        rollouts = engine.generate(prompts, config.sampling, (0, 1))
        first_gap = trial.compare(rollouts, 1)
        engine.sleep()
        naps += not engine.awake
        trial.update(rollouts)
        weight_sync.sync(policy.updates)
        require_change(weights, fingerprint(engine))
        gap = max(first_gap, trial.compare(engine.generate(prompts, config.sampling, (0, 2)), 2))
        report(f"engine and trainer agree to {gap:.0e} after each sync; the engine slept {naps} times")


@dataclass(frozen=True)
class Trial:
    """Engine and models of the runs."""

    config: Config
    engine: RolloutEngine
    policy: PolicyTrainer
    no_reward_model: RewardModelTrainer
    spec: PackingSpec

    def compare(self, rollouts: list[list[Rollout]], step: int) -> float:
        """Return the gap between log-probs of engine and trainer; raise LogprobMismatch where it is too large."""
        metrics = loop.check_logprob_parity(self.config, self.engine, self.policy, rollouts, self.spec, step)
        return metrics["parity/logprob_gap"]

    def update(self, rollouts: list[list[Rollout]]) -> float:
        """Update once on the rollouts, every second one taken as correct; return the gradient norm.

        Raises RuntimeError if there is no gradient.
        """
        samples = [
            Sample(rollout.prompt.tokens, rollout.tokens, reward, reward)
            for row in rollouts
            for rollout, reward in zip(row, (1.0, -1.0) * 2, strict=True)
        ]
        samples = rollout_exchange.fetch(samples, packing.own_numbers(samples, self.spec))
        batch = packing.batch(samples, self.spec)
        metrics = self.policy.update(batch, self.policy.score(batch), self.no_reward_model.update(batch)[0])
        norm = metrics["policy/gradient_norm"]
        if not (math.isfinite(norm) and norm > 0):
            raise RuntimeError(f"the gradient norm of one update is {norm}")
        return norm


def fingerprint(engine: WeightReceiver) -> list[float]:
    """Return a number for each parameter of this rank's engine that changes with its values."""
    return [tensor.double().square().sum().item() for tensor in engine.live()[0].values()]


def require_change(before: list[float], after: list[float]) -> list[float]:
    """Return `after`; raise RuntimeError if the engine has the weights that it had before the update."""
    if after == before:
        raise RuntimeError("the engine's weights are the same before and after an update and its weight sync")
    return after


def collective() -> str:
    """Sum a tensor over all ranks on their devices; raise RuntimeError if the sum is wrong."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    ones = torch.ones(2**22, device=device)
    dist.all_reduce(ones)
    if ones.min().item() != ones.max().item() or ones[0].item() != dist.get_world_size():
        raise RuntimeError(f"the sum of ones over {dist.get_world_size()} ranks is {ones[0].item()}")
    return f"{dist.get_world_size()} ranks on {device.type}"


@contextmanager
def part(name: str) -> Iterator[Callable[[str], None]]:
    """Time one part, and print what it reported once it has succeeded."""
    start, details = time.perf_counter(), list[str]()
    yield details.append
    if distributed.rank() == 0:
        print(f"{PREFIX}{name}: {', '.join(details)} ({time.perf_counter() - start:.1f} s)", flush=True)


if __name__ == "__main__":
    run(sys.argv[1])
