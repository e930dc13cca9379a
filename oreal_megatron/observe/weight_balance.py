"""Warning about a reward model that mutes one side: the token weights of all correct or of all incorrect samples."""

from __future__ import annotations

from collections.abc import Mapping

from oreal_megatron.protocols import Metrics

LOWEST_RATIO = 0.1  # of the smaller mean weight to the larger
RECOVERED_RATIO = 0.2  # at which a stretch of steps ends; above LOWEST_RATIO, or one near it would warn again and again
SMALLEST_MEAN = 0.01  # both sides begin at weight 0; below it their ratio says nothing
OPPOSITE = {"correct": "incorrect", "incorrect": "correct"}


def mean_weights(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the mean token weight of each side; {} without a reward model, and where a side has no tokens.

    The share of tokens with weight 0 is only logged with a reward model, and for a side that has tokens.
    """
    if any(f"weights/{side}_zero_share" not in metrics for side in OPPOSITE):
        return {}
    return {side: metrics[f"weights/{side}_mean"] for side in OPPOSITE}


def is_muted(lower: float, higher: float) -> bool:
    """Return whether a side with the lower mean weight hardly counts beside the other."""
    return higher >= SMALLEST_MEAN and lower < LOWEST_RATIO * higher


class WeightBalance:
    """Watch on the mean token weights of both sides of a run."""

    def __init__(self) -> None:
        self.muted = ""  # side that the present stretch of steps mutes

    def warning(self, metrics: Metrics) -> str:
        """Return a warning if a step begins a stretch in which one side is muted; else ""."""
        means = mean_weights(metrics)
        if not means:
            return ""
        low = min(means, key=means.__getitem__)
        lower, higher = means[low], means[OPPOSITE[low]]
        if lower >= RECOVERED_RATIO * higher:
            self.muted = ""
        if not is_muted(lower, higher) or low == self.muted:
            return ""
        self.muted = low
        return (
            f"the reward model mutes {low} samples: their mean token weight is {lower:.2g}, that of {OPPOSITE[low]} "
            f"ones {higher:.2g}. The policy learns mostly from the other side while this lasts. If weights.belief is "
            f"'prefix_mean', try 'token'; lower weights.threshold_{low} or reward_model.optimizer.lr, or warm-start "
            "the reward model"
        )
