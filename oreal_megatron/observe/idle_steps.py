"""Steps that trained on nothing: no samples, or token weights that are all 0."""

from __future__ import annotations

from collections.abc import Mapping

FIRST_REPORT = 5  # idle steps in a row; then reported again when there are twice as many


class IdleSteps:
    """Count of the steps that trained on nothing since the start of this process."""

    def __init__(self) -> None:
        self.steps = self.idle = self.in_a_row = 0
        self.next_report = FIRST_REPORT

    def report(self, metrics: Mapping[str, float]) -> str:
        """Count a step; return a message when too many in a row trained on nothing, else an empty text."""
        self.steps += 1
        cause = cause_of_idleness(metrics)
        if not cause:
            self.in_a_row, self.next_report = 0, FIRST_REPORT
            return ""
        self.idle, self.in_a_row = self.idle + 1, self.in_a_row + 1
        if self.in_a_row < self.next_report:
            return ""
        self.next_report *= 2
        return f"{self.in_a_row} steps in a row trained on nothing: {cause}"

    def summary(self) -> str:
        """Return a message on all steps, empty if each trained on something."""
        return f"{self.idle} of {self.steps} steps trained on nothing" if self.idle else ""


def cause_of_idleness(metrics: Mapping[str, float]) -> str:
    """Return why a step changed no weight of the policy or the reward model, empty if it did."""
    if not metrics["batch/samples"]:
        pass_rate = f"pass rate {metrics['reward/pass_rate']:.3f}, " if "reward/pass_rate" in metrics else ""
        return (
            f"no prompt has both correct and incorrect rollouts ({pass_rate}"
            f"{metrics['rollout/truncated_share']:.0%} truncated, {metrics['verify/unknown']:.0f} unknown). Check "
            "max_new_tokens, the gold answers, and pass rates in the data"
        )
    if metrics.get("policy/gradient_norm", 1.0) == 0:
        return "the policy's gradient is 0, so all token weights or loss coefficients are; check weights and loss"
    return ""
