"""Warning about a reward model that mutes one side: the token weights of all correct or of all incorrect samples."""

from __future__ import annotations

from oreal_megatron.protocols import Metrics

LOWEST_RATIO = 0.1  # of the smaller mean weight to the larger
RECOVERED_RATIO = 0.2  # at which a stretch of steps ends; above LOWEST_RATIO, or one near it would warn again and again
SMALLEST_MEAN = 0.01  # both sides begin at weight 0; below it their ratio says nothing
OPPOSITE = {"correct": "incorrect", "incorrect": "correct"}


class WeightBalance:
    """Watch on the mean token weights of both sides of a run."""

    def __init__(self) -> None:
        self.muted = ""  # side that the present stretch of steps mutes

    def warning(self, metrics: Metrics) -> str:
        """Return a warning if a step begins a stretch in which one side is muted; else ""."""
        means = {side: metrics[name] for side in OPPOSITE if (name := f"weights/{side}_mean") in metrics}
        if len(means) < len(OPPOSITE):  # no reward model, or one that skipped the step
            return ""
        low = min(means, key=means.__getitem__)
        lower, higher = means[low], means[OPPOSITE[low]]
        if lower >= RECOVERED_RATIO * higher:
            self.muted = ""
        if higher < SMALLEST_MEAN or lower >= LOWEST_RATIO * higher or low == self.muted:
            return ""
        self.muted = low
        return (
            f"the reward model mutes {low} samples: their mean token weight is {lower:.2g}, that of {OPPOSITE[low]} "
            f"ones {higher:.2g}. The policy learns mostly from the other side while this lasts; lower "
            f"weights.threshold_{low} or reward_model.optimizer.lr, or warm-start the reward model"
        )
