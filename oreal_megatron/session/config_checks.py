"""Checks of a configuration that need neither a model nor a GPU."""

from __future__ import annotations

import oreal_kernels

from oreal_megatron.algo import advantages
from oreal_megatron.config import Config, ConfigError

CHOICES = {
    "model.layers": ("local", "transformer_engine"),
    "model.dtype": ("float32", "bfloat16"),
    "engine.dtype": ("", "float32", "bfloat16"),
    "engine.transport": ("direct", "gather"),
    "selection.advantage": tuple(advantages.KINDS),
    "selection.keep": ("pair", "all"),
    "weights.rescale": ("threshold", "top_share"),
    "loss.kl_kind": tuple(oreal_kernels.KL_KINDS),
    "reward_model.score_at": ("token", "before"),
}


RANGES = (
    ("sampling.temperature", 0.0, 2.0),
    ("sampling.top_p", 1e-3, 1.0),
    ("sampling.max_new_tokens", 1, 10**7),
    ("data.prompts_per_step", 1, 10**6),
    ("engine.parity_rollouts", 1, 10**6),
    ("engine.buffer_mib", 1, 10**6),
    ("model.logits_mib", 1, 10**6),
    ("weights.threshold", 0.0, 0.99),
    ("weights.top_share", 0.0, 1.0),
    ("verify.unknown_limit", 0.0, 1.0),
    ("guard.max_consecutive_skips", 1, 10**6),
    ("guard.spike_factor", 0.0, 1e6),
    ("guard.spike_window", 1, 10**4),
)


def check_choices(config: Config) -> None:
    for key, allowed in CHOICES.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value not in allowed:
            raise ConfigError(f"{key} is {value!r}; wanted one of {', '.join(allowed)}")
    for key, low, high in RANGES:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if not low <= value <= high:
            raise ConfigError(f"{key} is {value}; wanted {low} to {high}")
    if config.sampling.rollouts_per_prompt < 2:
        raise ConfigError(
            f"sampling.rollouts_per_prompt is {config.sampling.rollouts_per_prompt}; leave-one-out advantages compare "
            "an answer with the others, so at least 2 are needed"
        )
    if config.reward_model.enabled and config.policy_freeze_steps >= config.steps:
        raise ConfigError(
            f"policy_freeze_steps is {config.policy_freeze_steps} and steps is {config.steps}: the policy would never "
            "be trained"
        )


def check_judge(config: Config) -> None:
    if config.verify.judge.required and not config.verify.judge.urls:
        raise ConfigError(
            "the recipe wants a judge, and verify.judge.urls names none; set OREAL_JUDGE_URLS=http://HOST:PORT,... "
            "(servers of an OpenAI-compatible API, as `vllm serve` is), or to none to be graded by the rules alone"
        )


def check_watchdog(config: Config) -> None:
    """Limits that would end a sound job: of a phase below what may be waited for in it, or above the outer bound."""
    limits, judge = config.watchdog, config.verify.judge
    for name, value in vars(limits).items():
        if name not in ("every_s", "collective_s") and not 5 * limits.every_s < value < limits.collective_s:
            raise ConfigError(
                f"watchdog.{name} is {value:g}; wanted more than 5 times watchdog.every_s ({limits.every_s:g}) and "
                f"less than watchdog.collective_s ({limits.collective_s:g})"
            )
    if judge.urls and limits.verify_s <= judge.all_down_wait_s:
        raise ConfigError(
            f"watchdog.verify_s is {limits.verify_s:g}, but verify.judge.all_down_wait_s lets a step wait "
            f"{judge.all_down_wait_s:g} s for judges; it must be longer"
        )
