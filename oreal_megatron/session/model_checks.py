"""Checks of a configuration against the model, the number of processes and vLLM, before anything is loaded.

Each raises ConfigError: what was found, what is expected, how to fix it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Sequence
from typing import Literal

from oreal_megatron.config import Config, ConfigError
from oreal_megatron.convert import to_megatron
from oreal_megatron.convert.hf_folder import HFFolder
from oreal_megatron.models import architecture
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.records import Prompt
from oreal_megatron.runtime import distributed

log = logging.getLogger(__name__)


def check_trackers(config: Config) -> None:
    """Check that the packages of the trackers are installed, and those of OpenTelemetry if spans are sent."""
    for name in config.record.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"record.trackers names {name}, which is not installed here; pip install {name}, or leave it out"
            )
    if config.record.opentelemetry and not all(
        map(_is_installed, ("opentelemetry.sdk", "opentelemetry.exporter.otlp"))
    ):
        raise ConfigError(
            "record.opentelemetry is true, and OpenTelemetry is not installed here; pip install opentelemetry-sdk "
            "opentelemetry-exporter-otlp, or set record.opentelemetry=false"
        )


def _is_installed(module: str) -> bool:
    """Return whether a module can be imported; its parents are."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent is missing
        return False


def check_world(config: Config, arch: Architecture) -> None:
    """Check that the number of processes fits the layouts of trainer and engine."""
    world, layout = distributed.world_size(), config.parallel
    trainer = ("parallel.tensor x pipeline x context", layout.tensor * layout.pipeline * layout.context)
    for what, size in (trainer, ("engine.tensor", config.engine.tensor)):
        if world % size:
            raise ConfigError(
                f"{world} processes were started, but {what} is {size}; start a multiple of {size} "
                "(oreal --processes, torchrun --nproc-per-node), or change the layout"
            )
    check_engine(config.engine.tensor, arch)


def check_engine(size: int, arch: Architecture) -> None:
    """Check that vLLM can split the model over `size` ranks; it would fail only after everything is loaded."""
    groups = arch.kv_groups
    for what, amount in (("attention heads", arch.heads), ("feed-forward units", arch.ffn)):
        if amount % size:
            raise ConfigError(f"engine.tensor is {size}, which does not divide {amount} {what}")
    if groups % size and size % groups:
        raise ConfigError(f"engine.tensor is {size}; expected a divisor or a multiple of {groups} key-value groups")
    if len(arch.names.qkv) == 1 and size > groups:
        raise ConfigError(
            f"engine.tensor is {size}, but vLLM cannot share InternLM2's {groups} key-value groups among more ranks; "
            f"set it to at most {groups}"
        )


def check_reward_model(reward: HFFolder, policy: HFFolder, arch: Architecture) -> None:
    """Check that a trained reward model has a scalar head on the layers of the policy's architecture."""
    if architecture.head(reward.config) != "scalar":
        raise ConfigError(
            f"reward_model.path is {reward.path}, a language model; expected a reward model, as `oreal reward-model` "
            "writes it. Without reward_model.path the reward model starts from the policy"
        )
    other = architecture.read(reward.config)
    for field in dataclasses.fields(arch):
        if getattr(other, field.name) != getattr(arch, field.name):
            raise ConfigError(
                f"reward_model.path is {reward.path}, whose {field.name} is {getattr(other, field.name)}; expected "
                f"{getattr(arch, field.name)}, that of {policy.path}: both models have one architecture"
            )
    to_megatron.check_weights(reward, arch, "scalar")


def check_kv_cache(config: Config, arch: Architecture) -> None:
    """Check that one sequence of full length fits the KV cache; vLLM would fail only after everything is loaded."""
    itemsize = {"float32": 4, "bfloat16": 2}[config.engine_dtype]
    groups = max(arch.kv_groups // config.engine.tensor, 1)
    needed = 2 * arch.layers * groups * arch.head_dim * itemsize * config.engine.max_model_len / 2**30
    if needed > config.engine.kv_cache_gib:
        raise ConfigError(
            f"engine.kv_cache_gib is {config.engine.kv_cache_gib:g}, but one sequence of {config.engine.max_model_len} "
            f"tokens needs {needed:.2f}; many run at once, so set several times that, or lower engine.max_model_len"
        )


def check_response_room(config: Config, prompts: Sequence[Prompt], section: Literal["sampling", "evaluation"]) -> None:
    """Check that responses of SECTION.max_new_tokens fit beside the prompts into engine.max_model_len.

    Warns where some prompts leave less room. Where all do, the setting means nothing: ConfigError for training.
    """
    limit, longest = config.engine.max_model_len, getattr(config, section).max_new_tokens
    lengths = sorted(len(prompt.tokens) for prompt in prompts)
    text = (
        f"{section}.max_new_tokens is {longest}, but engine.max_model_len is {limit} and prompts have {lengths[0]} to "
        f"{lengths[-1]} tokens"
    )
    if section == "sampling" and lengths[0] + longest > limit:
        raise ConfigError(
            f"{text}: every response would be cut off earlier. Raise engine.max_model_len to at least "
            f"{lengths[-1] + longest}, or set sampling.max_new_tokens to at most {limit - lengths[-1]}"
        )
    count = sum(length + longest > limit for length in lengths)
    if count and distributed.rank() == 0:
        log.warning("%s: responses to %d of %d prompts are cut off earlier", text, count, len(prompts))
