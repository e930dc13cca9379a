"""Everything a command needs: first all checks that need no GPU, then the pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from oreal_megatron import prompts, ranks, versions
from oreal_megatron.algo import advantages
from oreal_megatron.config import Config, ConfigError
from oreal_megatron.convert.hf_folder import Folder
from oreal_megatron.mapping import architecture
from oreal_megatron.records import Prompt
from oreal_megatron.verify import rules

CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "selection.advantage": tuple(advantages.KINDS),
    "selection.keep": ("pair", "all"),
    "weights.rescale": ("threshold", "top_share"),
    "loss.kl_kind": ("k1", "k1_reversed", "k2", "k3"),
    "reward_model.score_at": ("token", "before"),
}


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
        data, room = self.config.data, self.config.engine.max_model_len - 1
        read = prompts.load_prompts(path, self.tokenizer, data.system_prompt, room)
        return prompts.refuse_bad_golds(read, path, rules.equals_itself, data.drop_bad_golds)

    def held_out(self) -> list[Prompt]:
        """The problems to evaluate on; none when the recipe names no file."""
        if not self.config.data.held_out:
            return []
        return self.prompts(self.config.data.held_out)[: self.config.evaluation.problems or None]


def prepare(config: Config) -> Inputs:
    """Check configuration, model folder and world size; each fault is a ConfigError with a sentence."""
    versions.check(versions.MEGATRON)
    versions.check(versions.VLLM)
    _check_choices(config)
    folder = Folder(config.model.path)
    arch = architecture.read(folder.config)
    arch.check_layout(config.parallel.tensor, config.parallel.pipeline)
    _check_world(config, arch)
    if config.engine.max_model_len > arch.max_positions:
        raise ConfigError(
            f"engine.max_model_len is {config.engine.max_model_len}, but the model was made for "
            f"{arch.max_positions} positions"
        )
    tokenizer = prompts.load_tokenizer(config.model.path)
    if len(tokenizer) > arch.vocab:
        raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {arch.vocab}")
    return Inputs(config, folder, arch, tokenizer, prompts.stop_tokens(tokenizer, config.model.path))


def _check_choices(config: Config) -> None:
    for key, allowed in CHOICES.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value not in allowed:
            raise ConfigError(f"{key} is {value!r}; wanted one of {', '.join(allowed)}")
    if config.sampling.answers_per_prompt < 2:
        raise ConfigError(
            f"sampling.answers_per_prompt is {config.sampling.answers_per_prompt}; leave-one-out advantages compare an "
            "answer with the others, so at least 2 are needed"
        )
    if config.reward_model.enabled and config.policy_freeze_steps >= config.steps:
        raise ConfigError(
            f"policy_freeze_steps is {config.policy_freeze_steps} and steps is {config.steps}: the policy would never "
            "be trained"
        )


def _check_world(config: Config, arch: architecture.Architecture) -> None:
    world, trainer = ranks.world_size(), config.parallel.tensor * config.parallel.pipeline
    for what, size in (("parallel.tensor x parallel.pipeline", trainer), ("engine.tensor", config.engine.tensor)):
        if world % size:
            raise ConfigError(
                f"{world} processes were started, but {what} is {size}; start a multiple of {size} with "
                "torchrun --nproc-per-node, or change the layout"
            )
    if arch.heads % config.engine.tensor:
        raise ConfigError(
            f"engine.tensor is {config.engine.tensor}, which does not divide {arch.heads} attention heads"
        )


def start_engine(inputs: Inputs) -> tuple[Any, Any]:
    """The engine and the verifier of what it generates. Collective."""
    from oreal_megatron.rollout.engine import Engine  # imports vllm, which takes seconds
    from oreal_megatron.verify.gathered import StepVerifier
    from oreal_megatron.verify.grader import Grader

    config = inputs.config
    engine = Engine(config, inputs.stop_tokens, inputs.tokenizer)
    return engine, StepVerifier(Grader(config.verify), config.verify.unknown_limit)


def full_tensors(policy: Any) -> Iterator[tuple[str, Tensor]]:
    """The policy's weights in Hugging Face terms, on every rank. Collective: every rank must exhaust it."""
    from oreal_megatron.mcore import model, parallel
    from oreal_megatron.reshard.gather import Layout, full_tensors

    layout = Layout(*parallel.groups(), model.DTYPES[policy.config.model.dtype], model.device())
    return full_tensors(policy.placed(), policy.arch, layout)


def hand_over(policy: Any, engine: Any) -> None:
    """The policy's weights -> the engine."""
    engine.load(full_tensors(policy), policy.updates)
