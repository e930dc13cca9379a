"""Everything a command needs: first all checks that need no GPU, then the pieces."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from oreal_megatron.config import Config, ConfigError, require_judge, validate
from oreal_megatron.convert import megatron_folder, to_megatron
from oreal_megatron.convert.hf_folder import Folder
from oreal_megatron.data import problems
from oreal_megatron.math_equality import rules
from oreal_megatron.models import architecture
from oreal_megatron.protocols import WeightReceiver
from oreal_megatron.records import Prompt
from oreal_megatron.reshard import weight_sync
from oreal_megatron.runtime import distributed, versions
from oreal_megatron.verify import judge


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What was read and found sound before anything was loaded."""

    config: Config
    folder: Folder
    arch: architecture.Architecture
    tokenizer: PreTrainedTokenizerBase
    stop_tokens: list[int]

    def prompts(self, path: str) -> list[Prompt]:
        """The problems of a JSONL file, with golds the verifier can work with."""
        return problems.refuse_bad_golds(
            self.rendered(path), path, rules.equals_itself, self.config.data.drop_unreadable_golds
        )

    def rendered(self, path: str) -> list[Prompt]:
        """The problems of a JSONL file, whatever their golds."""
        room = self.config.engine.max_model_len - 1
        return problems.load_prompts(path, self.tokenizer, self.config.data.system_prompt, room)

    def fingerprints(self) -> dict[str, str]:
        """Digests of what a resumed run must find unchanged."""
        files = {f"data {path}": Path(path) for path in (self.config.data.path, self.config.supervised.path) if path}
        digests = {name: hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() for name, path in files.items()}
        return {f"model {self.folder.path}": self.folder.fingerprint(), **digests}

    def held_out(self) -> list[Prompt]:
        """The problems to evaluate on; none when the recipe names no file."""
        if not self.config.data.held_out:
            return []
        return self.prompts(self.config.data.held_out)[: self.config.evaluation.problems or None]


def prepare(config: Config) -> Inputs:
    """Check configuration, model folder and world size; each fault is a ConfigError with a sentence."""
    versions.check(versions.MEGATRON)
    versions.check(versions.VLLM)
    validate(config)
    require_judge(config)
    folder = Folder(config.model.path)
    arch = architecture.read(folder.config)
    if architecture.head(folder.config) != "lm":
        raise ConfigError(f"{config.model.path} is a reward model; model.path is the starting policy")
    to_megatron.check_weights(folder, arch, "lm")
    _check_allocator(config)
    judge.refuse_secrets(config.verify.judge.urls)
    arch.check_layout(config.parallel.tensor, config.parallel.pipeline, config.parallel.virtual)
    arch.check_training(config.parallel.tensor, config.parallel.sequence)
    _check_world(config, arch)
    if config.engine.max_model_len > arch.max_positions:
        raise ConfigError(
            f"engine.max_model_len is {config.engine.max_model_len}, but the model was made for "
            f"{arch.max_positions} positions"
        )
    _check_cache(config, arch)
    tokenizer = problems.load_tokenizer(config.model.path, config.model.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {config.model.path} names no end-of-sequence token; answers could not end")
    if len(tokenizer) > arch.vocab:
        raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {arch.vocab}")
    return Inputs(config, folder, arch, tokenizer, problems.stop_tokens(tokenizer, config.model.path))


def _check_world(config: Config, arch: architecture.Architecture) -> None:
    world, layout = distributed.world_size(), config.parallel
    trainer = ("parallel.tensor x pipeline x context", layout.tensor * layout.pipeline * layout.context)
    for what, size in (trainer, ("engine.tensor", config.engine.tensor)):
        if world % size:
            raise ConfigError(
                f"{world} processes were started, but {what} is {size}; start a multiple of {size} with "
                "torchrun --nproc-per-node, or change the layout"
            )
    _check_engine(config.engine.tensor, arch)


def _check_engine(size: int, arch: architecture.Architecture) -> None:
    """What vLLM would refuse, or cannot run, after everything is loaded."""
    groups = arch.kv_groups
    for what, amount in (("attention heads", arch.heads), ("feed-forward units", arch.ffn)):
        if amount % size:
            raise ConfigError(f"engine.tensor is {size}, which does not divide {amount} {what}")
    if groups % size and size % groups:
        raise ConfigError(f"engine.tensor is {size}; wanted a divisor or a multiple of {groups} key-value groups")
    if len(arch.names.qkv) == 1 and size > groups:
        raise ConfigError(
            f"engine.tensor is {size}, but vLLM cannot share InternLM2's {groups} key-value groups among more ranks; "
            f"set it to at most {groups}"
        )


def _check_allocator(config: Config) -> None:
    """vLLM's sleep mode brings an allocator that expandable segments exclude."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if config.engine.sleep and "expandable_segments:true" in os.environ.get(name, "").lower():
            raise ConfigError(
                f"{name} asks for expandable segments, which exclude vLLM's sleep mode; take them out of it, or set "
                "engine.sleep=false"
            )


def _check_cache(config: Config, arch: architecture.Architecture) -> None:
    """One sequence of full length must fit the key-value cache, or vLLM refuses after everything is loaded."""
    itemsize = {"float32": 4, "bfloat16": 2}[config.engine_dtype]
    groups = max(arch.kv_groups // config.engine.tensor, 1)
    needed = 2 * arch.layers * groups * arch.head_dim * itemsize * config.engine.max_model_len / 2**30
    if needed > config.engine.kv_cache_gib:
        raise ConfigError(
            f"engine.kv_cache_gib is {config.engine.kv_cache_gib:g}, but one sequence of {config.engine.max_model_len} "
            f"tokens needs {needed:.2f}; many run at once, so give several times that, or lower engine.max_model_len"
        )


def start_engine(inputs: Inputs, leave: Callable[[], bool] = lambda: False) -> tuple[Any, Any]:
    """The engine and the verifier of what it generates; `leave`: whether to end generating early. Collective."""
    from oreal_megatron.rollout.engine import VllmEngine  # imports vllm, which takes seconds
    from oreal_megatron.verify.grader import Grader
    from oreal_megatron.verify.step_verifier import StepVerifier

    config = inputs.config
    engine = VllmEngine(config, inputs.stop_tokens, inputs.tokenizer, leave)
    return engine, StepVerifier(Grader(config.verify), config.verify.unknown_limit)


full_tensors = weight_sync.full_tensors


def describe(inputs: Inputs, name: str, checkpoint: Path) -> None:
    """Write into a checkpoint of "policy" or "reward_model" which model it is, so that it can be converted alone."""
    head = "scalar" if name == "reward_model" else "lm"
    megatron_folder.describe(inputs.folder, checkpoint, head, getattr(torch, inputs.config.model.dtype))


def connect(policy: weight_sync.WeightSource, engine: WeightReceiver) -> weight_sync.EngineWeightSync:
    """Return the weight sync of a policy and an engine, and print its transport once. Collective."""
    connection = weight_sync.connect(policy, engine)
    if distributed.rank() == 0:
        print(f"weight sync: {connection.description}", flush=True)
    return connection
