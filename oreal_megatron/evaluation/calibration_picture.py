"""Calibration of the reward model over a run: share of correct samples against its belief in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from oreal_megatron.algo.reward_diagnostics import BINS, CalibrationBins
from oreal_megatron.config import ConfigError
from oreal_megatron.evaluation import statistics
from oreal_megatron.observe.rows import Row, read_rows

QUARTERS = (("first quarter of the steps", 0, 1, "0.65"), ("last quarter of the steps", 3, 4, "C0"))


def draw(run: Path, path: Path) -> None:
    """Draw the bins of a run's first and last quarter, with 95 % intervals, and how many samples are in them."""
    rows = read_rows(run / "calibration.jsonl")
    if not rows:
        raise ConfigError(f"{run} has no calibration.jsonl: no step had samples for a reward model")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (shares, counts) = plt.subplots(
        2, 1, figsize=(5.6, 6.4), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    shares.plot([0, 1], [0, 1], color="0.8", linestyle="--", label="calibrated")
    centres = [(number + 0.5) / BINS for number in range(BINS)]
    for (label, first, stop, color), offset in zip(QUARTERS, (-0.008, 0.008), strict=True):
        bins = sum_bins(rows[len(rows) * first // 4 : max(len(rows) * stop // 4, 1)])
        filled = [number for number in range(BINS) if bins.counts[number]]
        values = [bins.correct[number] / bins.counts[number] for number in filled]
        intervals = [statistics.wilson_interval(bins.correct[number], bins.counts[number]) for number in filled]
        errors = [[value - low for value, (low, _) in zip(values, intervals, strict=True)],
                  [high - value for value, (_, high) in zip(values, intervals, strict=True)]]  # fmt: skip
        places = [centres[number] + offset for number in filled]
        shares.errorbar(places, values, yerr=errors, marker="o", capsize=3, color=color, label=label)
        counts.bar([centre + 3 * offset for centre in centres], bins.counts, width=0.04, color=color)
    shares.set(title=f"calibration of the reward model: {run}", ylabel="share correct (95 % interval)", ylim=(0, 1))
    shares.legend(loc="upper left")
    counts.set(xlabel="belief: sigmoid(mean token score)", ylabel="samples", xlim=(0, 1))
    for axes in (shares, counts):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def sum_bins(rows: Sequence[Row]) -> CalibrationBins:
    """Return the bins of several steps together."""
    columns = {name: zip(*(row[name] for row in rows), strict=True) for name in ("counts", "correct")}
    return CalibrationBins(**{name: [sum(values) for values in column] for name, column in columns.items()})
