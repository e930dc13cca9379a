"""Reward, metric and step hook of your own: texts that hold all of a problem's words, and few others.

Lines of the data have `question`, `domain` and, by domain, `words` or `gold_answer`. See docs/how_to/extensions.md.
"""

import os
from pathlib import Path

from oreal_megatron import math_equality
from oreal_megatron.config import Config, DataConfig, ModelConfig, RecordConfig, SamplingConfig, VerifyConfig

MOST_FURTHER_WORDS = 20


def reward(row: dict, response: str) -> bool | None:
    """Return whether a response is correct; None: unknown, which is neither rewarded nor punished."""
    if row["domain"] == "mathematics":  # the rules of the package, for one domain of several
        return math_equality.grade(row["gold_answer"], response).outcome == "correct"
    if row["domain"] != "words":
        return None
    words = response.lower().split()
    return set(row["words"]) <= set(words) and len(words) <= len(row["words"]) + MOST_FURTHER_WORDS


def metric(rollouts, verdicts) -> dict[str, float]:
    """Return metrics of a step, logged as own/NAME. `rollouts` and `verdicts` are [P, K]."""
    responses = [rollout.text for row in rollouts for rollout in row]
    return {"words_mean": sum(len(text.split()) for text in responses) / len(responses)}


def after_step(step: int, metrics: dict[str, float], run: str) -> None:
    """Write the pass rate where another program looks for it."""
    Path(run, "pass_rate.txt").write_text(f"{step} {metrics['reward/pass_rate']:.3f}\n")


def own_reward() -> Config:
    """Return a run that uses all three."""
    return Config(
        run=os.environ.get("OREAL_RUNS", "runs") + "/own_reward",
        model=ModelConfig(os.environ.get("OREAL_MODELS", "models") + "/Qwen2.5-0.5B-Instruct", dtype="bfloat16"),
        data=DataConfig(os.environ.get("OREAL_DATA", "data") + "/words.jsonl", prompts_per_step=32),
        sampling=SamplingConfig(rollouts_per_prompt=8, max_new_tokens=256),
        verify=VerifyConfig(function=f"{__file__}:reward"),
        record=RecordConfig(metric=f"{__file__}:metric", after_step=f"{__file__}:after_step"),
    )
