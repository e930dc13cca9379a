"""Figures of a run that are outside their usual range, for the reader to look at first."""

from __future__ import annotations

from collections.abc import Iterator

from oreal_megatron.observe import weight_balance
from oreal_megatron.observe.page.run_data import RunData

TRUNCATED_SHARE = 0.05
LOWEST_AUC = 0.55
LOWEST_MIXED_SHARE = 0.2
ENTROPY_RATIO = 0.1
LENGTH_RATIO = 2.0


def findings(run: RunData) -> list[str]:
    """Return sentences about the last steps of a run; none if nothing stands out."""
    return [*_of_rollouts(run), *_of_policy(run), *_of_reward_model(run)]


def _of_rollouts(run: RunData) -> Iterator[str]:
    truncated = run.mean_of_last("rollout/truncated_share") or 0.0
    if truncated > TRUNCATED_SHARE:
        yield f"{truncated:.0%} of the responses are truncated: raise sampling.max_new_tokens, or see if they loop"
    if unknown := sum(value for _, value in run.points("verify/unknown")):
        yield f"{unknown:.0f} verdicts of the run are unknown: see the reasons in the rollouts below"
    prompts = run.record.config.get("data", {}).get("prompts_per_step")
    mixed = run.mean_of_last("batch/mixed_prompts")
    if mixed is not None and prompts and mixed < LOWEST_MIXED_SHARE * prompts:
        yield f"{mixed:.1f} of {prompts} prompts of a step are mixed: most are too easy or too hard to learn from"


def _of_policy(run: RunData) -> Iterator[str]:
    for model in ("policy", "reward_model"):
        points = run.points(f"{model}/skipped")
        if points and points[-1][1]:
            yield f"{points[-1][1]:.0f} updates of the {model.replace('_', ' ')} were skipped by the guard"
    entropy = run.points("policy/entropy_estimate")
    last = run.mean_of_last("policy/entropy_estimate")
    if entropy and last is not None and last < ENTROPY_RATIO * entropy[0][1]:
        yield f"the policy's entropy fell from {entropy[0][1]:.3g} to {last:.3g} nats: samples hardly differ"
    lengths, length = run.points("rollout/response_tokens_mean"), run.mean_of_last("rollout/response_tokens_mean")
    if lengths and length is not None and length > LENGTH_RATIO * lengths[0][1]:
        yield f"responses grew from {lengths[0][1]:.0f} to {length:.0f} tokens: see if the additional ones help"


def _of_reward_model(run: RunData) -> Iterator[str]:
    auc = run.mean_of_last("reward_model/auc", 20)
    if auc is not None and auc < LOWEST_AUC:
        yield f"the reward model's AUC is {auc:.2f}: its token weights are close to arbitrary"
    names = [f"weights/{side}_{figure}" for side in ("correct", "incorrect") for figure in ("mean", "zero_share")]
    means = weight_balance.mean_weights({n: value for n in names if (value := run.mean_of_last(n)) is not None})
    if means and weight_balance.is_muted(min(means.values()), max(means.values())):
        low = min(means, key=means.__getitem__)
        yield f"the reward model mutes {low} samples: their mean token weight is {means[low]:.2g}"
