"""The charts of the page, by section."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from oreal_megatron.observe.metric_table import plain_meaning
from oreal_megatron.observe.page.charts import Chart, Series, draw_histogram, draw_lines, draw_stack
from oreal_megatron.observe.page.run_data import BINS, RunData

PHASES = ("generate", "verify", "parity", "reward_model", "reference", "policy", "weight_sync", "checkpoint")


class Panel(NamedTuple):
    """Metrics over steps in one chart."""

    title: str
    metrics: tuple[tuple[str, str], ...]  # metric, label
    note: str = ""
    bounds: tuple[float, float] | None = None
    logarithmic: bool = False


SHARES = (0.0, 1.0)
LEARNING = (
    Panel("Pass rate of rollouts", (("reward/pass_rate", "pass rate"),), "training prompts, as sampled", SHARES),
    Panel("Policy loss", (("loss/total", "total"),), "positive + negative + KL, with their coefficients"),
    Panel("Loss terms", (("loss/positive", "positive"), ("loss/negative", "negative"))),
    Panel("KL from the reference", (("policy/reference_kl", "nats per token"),), "steady growth: the policy drifts"),
    Panel("Entropy of the policy", (("policy/entropy_estimate", "nats per token"),), "a fall to 0 is a collapse"),
)
ROLLOUTS = (
    Panel(
        "Response length",
        (("rollout/response_tokens_mean", "mean"), ("rollout/response_tokens_max", "longest")),
        "tokens, with the stop token",
    ),
    Panel("Truncated responses", (("rollout/truncated_share", "share"),), "they count as incorrect"),
    Panel("Unknown verdicts", (("verify/unknown", "rollouts"),), "above verify.unknown_limit the run stops"),
)
REWARD_MODEL = (
    Panel("Reward model loss", (("loss/reward_model", "cross entropy"),), "0.693: it knows nothing"),
    Panel(
        "Reward model AUC",
        (("reward_model/auc", "AUC"), ("reward_model/correct_above_incorrect", "within prompts")),
        "0.5: it knows nothing",
        SHARES,
    ),
    Panel(
        "Mean token weight",
        (("weights/correct_mean", "correct"), ("weights/incorrect_mean", "incorrect")),
        "one side far below the other is muted",
    ),
    Panel(
        "Tokens with weight 0",
        (("weights/correct_zero_share", "correct"), ("weights/incorrect_zero_share", "incorrect")),
        "share of the side's tokens",
        SHARES,
    ),
)
STABILITY = (
    Panel(
        "Gradient norm",
        (("policy/gradient_norm", "policy"), ("reward_model/gradient_norm", "reward model")),
        "before clipping; logarithmic",
        logarithmic=True,
    ),
    Panel(
        "Skipped updates",
        (("policy/skipped", "policy"), ("reward_model/skipped", "reward model")),
        "refused by the guard, in the run so far",
    ),
    Panel("Learning rate", (("policy/learning_rate", "policy"), ("reward_model/learning_rate", "reward model"))),
    Panel(
        "Logprob gap of engine and trainer",
        (("parity/logprob_gap", "nats"),),
        "the run stops above engine.parity_tolerance_nats; logarithmic",
        logarithmic=True,
    ),
)
SPEED = (
    Panel(
        "Tokens per second and GPU",
        (
            ("speed/tokens_per_second_per_gpu/step", "entire step"),
            ("speed/tokens_per_second_per_gpu/generate", "generate"),
        ),
    ),
)


def own(runs: Sequence[RunData]) -> list[Panel]:
    """Return a panel for each metric of the user's function."""
    names = {name for run in runs for row in run.record.metrics for name in row if name.startswith("own/")}
    return [Panel(name, ((name, name),)) for name in sorted(names)]


def draw_panel(panel: Panel, runs: Sequence[RunData]) -> str:
    """Draw a panel: colours tell runs apart, or metrics if there is one run."""
    several = len(runs) > 1
    series = [
        Series(_label(run.name if several else "", label, len(panel.metrics)), points, *_style(several, order, number))
        for order, run in enumerate(runs)
        for number, (metric, label) in enumerate(panel.metrics)
        if (points := run.points(metric))
    ]
    meanings = "\n".join(f"{metric}: {plain_meaning(metric)}" for metric, _ in panel.metrics)
    return draw_lines(
        Chart(panel.title, series, panel.note, meanings, bounds=panel.bounds, logarithmic=panel.logarithmic)
    )


def _style(several: bool, run: int, metric: int) -> tuple[int, int]:
    return (run, metric) if several else (metric, 0)


def _label(run: str, metric: str, metrics: int) -> str:
    if not run:
        return metric
    return run if metrics == 1 else f"{run}: {metric}"


def draw_accuracy(runs: Sequence[RunData]) -> str:
    """Draw held-out accuracy with its interval; sampled responses are dashed."""
    series = []
    for number, run in enumerate(runs):
        for dash, (prefix, mode) in enumerate((("", "greedy"), ("sampled_", "sampled"))):
            points = run.evaluation(f"{prefix}accuracy")
            low, high = run.evaluation(f"{prefix}low"), run.evaluation(f"{prefix}high")
            label = f"{run.name}: {mode}" if len(runs) > 1 else mode
            series.append(Series(label, points, number, dash, low, high, dots=True))
    return draw_lines(Chart("Held-out accuracy", series, "bands: 95 % interval over problems", bounds=SHARES))


def draw_calibration(runs: Sequence[RunData]) -> str:
    """Draw the share of correct samples over the belief of the reward model, of the last half of each run."""
    series = []
    for order, run in enumerate(runs):
        rows = run.calibration[len(run.calibration) // 2 :]
        counts = [sum(row["counts"][number] for row in rows) for number in range(BINS)]
        correct = [sum(row["correct"][number] for row in rows) for number in range(BINS)]
        bins = list(zip(counts, correct, strict=True))
        points = [((number + 0.5) / BINS, right / count) for number, (count, right) in enumerate(bins) if count]
        series.append(Series(run.name, points, order, dots=True))
    note = "last half of the run; a calibrated model lies on the diagonal"
    guides = (((0.0, 0.0), (1.0, 1.0)),)
    return draw_lines(
        Chart("Calibration of the reward model", series, note, "", "belief", SHARES, SHARES, guides=guides)
    )


def draw_prompts(run: RunData, heading: str) -> str:
    """Draw how many prompts of a step gave samples, and why the others did not."""
    rows = []
    for row in run.record.metrics:
        if "batch/mixed_prompts" in row and "reward/solvable_prompts" in row:
            mixed, solvable = row["batch/mixed_prompts"], row["reward/solvable_prompts"]
            prompts = run.record.config.get("data", {}).get("prompts_per_step", solvable)
            rows.append((row["step"], [mixed, max(solvable - mixed, 0), max(prompts - solvable, 0)]))
    labels = ("mixed: trained on", "all correct", "none correct")
    return draw_stack(f"Prompts of a step{heading}", labels, rows, "legend: mean over the run")


def draw_pass_rates(run: RunData, heading: str) -> str:
    """Draw how many prompts have which pass rate, at the start and at the end."""
    third = max(len(run.counts) // 3, 1)
    groups = []
    for name, part in (("first steps", run.counts[:third]), ("last steps", run.counts[-third:])):
        groups.append((name, [sum(step.pass_rates[number] for step in part) for number in range(BINS)]))
    note = "share of the prompts; steps without a rollout file are left out"
    return draw_histogram(f"Pass rate by prompt{heading}", groups, "pass rate", note)


def draw_methods(run: RunData, heading: str) -> str:
    """Draw how verdicts were reached."""
    total: Counter[str] = sum((step.methods for step in run.counts), Counter())
    methods = [name for name, _ in total.most_common(7)]
    rows = []
    for step in run.counts:
        if not (size := sum(step.methods.values())):
            continue
        shares = [step.methods[name] / size for name in methods]
        rows.append((float(step.step), shares))
    note = "share of the step's rollouts; the seven most frequent"
    return draw_stack(f"Verdicts by method{heading}", methods, rows, note)


def draw_phases(run: RunData, heading: str) -> str:
    """Draw the seconds of each phase that the run has; a step without one of them spent no time in it."""
    timed = [row for row in run.record.metrics if "seconds/step" in row]
    names = [name for name in PHASES if any(f"seconds/{name}" in row for row in timed)]
    rows = []
    for row in timed:
        phases = [row.get(f"seconds/{name}", 0.0) for name in names]
        rows.append((row["step"], [*phases, max(row["seconds/step"] - sum(phases), 0.0)]))
    labels = [*(name.replace("_", " ") for name in names), "others"]
    return draw_stack(f"Seconds of a step{heading}", labels, rows, "wall clock of the first rank; legend: means")
