"""Every metric of a run: name, unit, meaning, and what to watch for.

tools/make_metrics_reference.py makes the tables of docs/reference/metrics.md from it; the charts of `oreal report`
show the meanings. A word in capitals in a name stands for one of several.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple


class MetricInfo(NamedTuple):
    """One row: metrics that are explained together."""

    names: tuple[str, ...]
    unit: str
    meaning: str  # Markdown, as in the page
    watch: str = ""


PLACEHOLDERS = {"MODEL": "(?:policy|reward_model)", "PHASE": "[a-z_]+", "PART": "[a-z_]+", "NAME": ".+"}

SAMPLED = (
    MetricInfo(
        ("reward/pass_rate",),
        "0 to 1",
        "share of correct rollouts among those with a known verdict",
        "the learning signal; prompts are repeated by difficulty, so it is below held-out accuracy",
    ),
    MetricInfo(
        ("reward/mean",),
        "",
        "mean reward over the same: +1 and -1, or the numbers of `verify.function`",
        "2 × pass rate - 1",
    ),
    MetricInfo(("reward/solvable_prompts",), "prompts", "prompts with at least one correct rollout", ""),
    MetricInfo(
        ("verify/unknown",), "rollouts", "rollouts without a verdict", "0; the run stops above `verify.unknown_limit`"
    ),
    MetricInfo(("verify/seconds_sum",), "s", "seconds that grading took, summed over rollouts", ""),
    MetricInfo(("rollout/count",), "rollouts", "rollouts of the step, P × K", ""),
    MetricInfo(
        ("rollout/response_tokens_mean", "rollout/response_tokens_max"),
        "tokens",
        "tokens of a response, the stop token included",
        "growth towards `sampling.max_new_tokens`",
    ),
    MetricInfo(
        ("rollout/truncated_share",),
        "0 to 1",
        "responses that did not end by themselves; they are incorrect",
        "above a few per cent: raise `sampling.max_new_tokens`",
    ),
    MetricInfo(
        ("penalty/repetition", "penalty/overlong", "penalty/gibberish", "penalty/perplexity"),
        "rollouts",
        "rollouts with a penalty (`selection.penalties`; [T1](../how_to/t1.md)); `RUN/rollouts` names it at each",
        "a rise: the policy degenerates",
    ),
    MetricInfo(
        ("batch/mixed_prompts",),
        "prompts",
        "prompts with correct and incorrect rollouts",
        "few: the prompts are too easy or too hard",
    ),
    MetricInfo(
        ("batch/samples",),
        "samples",
        "samples trained on over all ranks",
        'twice the mixed prompts with `selection.keep="pair"`, all known rollouts with `"all"`',
    ),
)

SPECULATION = (
    MetricInfo(("rollout/drafted_tokens",), "tokens", "tokens drafted since the last step, in evaluations too"),
    MetricInfo(
        ("rollout/draft_accepted_share",),
        "0 to 1",
        "share of these that sampling accepted",
        "low: drafts cost more than they save; fewer `engine.speculative.tokens`, a longer `ngram_min`, or off",
    ),
)

PARTIAL_ROLLOUTS = (
    MetricInfo(("rollout/pool_prompts",), "prompts", "prompts in flight at the beginning of the step"),
    MetricInfo(("rollout/rounds",), "", "rounds of generation in the step"),
    MetricInfo(("rollout/carried_rollouts",), "rollouts", "responses, begun or complete, that stay in the pool"),
    MetricInfo(
        ("rollout/carried_tokens",),
        "tokens",
        "tokens of these",
        "a rise without end: `rollout.pool` is too large for these lengths",
    ),
    MetricInfo(("rollout/generated_tokens",), "tokens", "tokens generated in the step, those of discarded ones too"),
    MetricInfo(("rollout/aborted",), "rollouts", "responses that were begun and discarded before their end"),
    MetricInfo(
        ("rollout/discarded_token_share",), "", "tokens of discarded prompts over those generated", "work for nothing"
    ),
    MetricInfo(
        ("rollout/dropped_prompts",), "prompts", "prompts dropped because they were older than `rollout.staleness`"
    ),
    MetricInfo(
        ("rollout/earlier_version_share",),
        "0 to 1",
        "share of the trained rollouts' tokens that an earlier version of the policy sampled",
        "growth: the samples are further from the policy",
    ),
    MetricInfo(
        ("rollout/version_lag_mean", "rollout/version_lag_max"),
        "updates",
        "versions between the trained rollouts' tokens and the policy",
    ),
    MetricInfo(
        ("rollout/length_ratio",),
        "",
        "mean length of trained responses over that of trained and discarded ones",
        "below 1: long responses are left out, a bias",
    ),
)

LOSSES_AND_MODELS = (
    MetricInfo(
        ("loss/total",),
        "",
        "the policy loss (paper, Eq. 11); with `loss.mini_batches`, as all metrics of the policy's losses and "
        "gradients, the mean over the last update of each (means over tokens by tokens), or the value of a skipped one",
        "",
    ),
    MetricInfo(
        ("loss/positive",),
        "",
        'loss of correct samples over correct tokens (all tokens with `loss.normalise="joint"`), before its '
        "coefficient",
        "",
    ),
    MetricInfo(
        ("loss/negative",), "", "loss of incorrect samples over incorrect tokens (or all), before its coefficient", ""
    ),
    MetricInfo(
        ("loss/kl",), "nats/token", "KL term of `loss.kl_kind` over all action tokens, before its coefficient", ""
    ),
    MetricInfo(("loss/term",), "", "value of `loss.term`, with the sign it has in the loss", ""),
    MetricInfo(
        ("loss/cross_entropy", "loss/distillation"),
        "",
        "`oreal distill`: cross entropy of the demonstrations, and `distillation.objective`, before their coefficients",
    ),
    MetricInfo(
        ("distillation/correlation",),
        "-1 to 1",
        "mean Pearson correlation of student and teacher over channels ([Distillation](../how_to/distillation.md))",
        "a rise; 0: unrelated",
    ),
    MetricInfo(
        ("distillation/constant_channels",),
        "channels",
        "channels without a correlation, because they are constant on one side",
        "many: dead channels",
    ),
    MetricInfo(
        ("policy/reference_kl",), "nats/token", "mean of logp - reference logp, nats per token", "steady growth"
    ),
    MetricInfo(
        ("policy/entropy",),
        "nats",
        "mean entropy of the policy over the vocabulary at the samples' tokens, exact, at `sampling.temperature`, nats",
        "a fall to 0: collapse",
    ),
    MetricInfo(
        ("policy/response_kl",),
        "nats",
        "with `loss.reward_kl_coef`: mean over samples of the KL estimate of a response, the sum over its tokens, nats",
        "steady growth",
    ),
    MetricInfo(
        ("policy/entropy_estimate",),
        "nats",
        "mean of -logp over the samples' tokens, at `sampling.temperature`, nats",
        "a fall to 0: collapse",
    ),
    MetricInfo(
        ("policy/ratio_mean", "policy/ratio_capped_share"),
        "",
        "with `loss.ratio_cap`: mean truncated importance ratio of incorrect samples' tokens; share that the "
        "cap truncates",
        "far from 1; growth",
    ),
    MetricInfo(
        ("weights/correct_mean", "weights/incorrect_mean"),
        "0 to 1",
        "mean token weight of correct and of incorrect samples; the latter times the ratio with `loss.ratio_cap`",
        "of the same order; a line above the progress bar tells when one falls below a tenth of the other",
    ),
    MetricInfo(
        ("weights/correct_zero_share", "weights/incorrect_zero_share"),
        "0 to 1",
        "share of the tokens of each side with weight 0",
        "both fall together from 1, where a reward model with a zero head begins; one that stays at 1 is a muted side",
    ),
    MetricInfo(
        ("loss/reward_model",),
        "",
        "cross entropy (paper, Eq. 12; `reward_model.objective`)",
        "ln 2 = 0.693: it knows nothing",
    ),
    MetricInfo(
        ("reward_model/auc",),
        "0 to 1",
        "chance that a correct sample scores above an incorrect one (ROC AUC over the step's samples, ties "
        "half); the score is the mean of the token scores",
        "above 0.6 and rising; 0.5: it knows nothing. A step has few samples: read the trend",
    ),
    MetricInfo(
        ("reward_model/correct_above_incorrect",),
        "0 to 1",
        'the same within each prompt, mean over prompts; with `selection.keep="pair"` the share of prompts '
        "whose correct sample scores above the incorrect one",
        "as AUC; far below it: it judges prompts by their difficulty",
    ),
    MetricInfo(
        ("reward_model/accuracy",),
        "0 to 1",
        "share of samples with a mean score on the side of their outcome",
        "0.5 also where all scores have one sign; AUC sees through that",
    ),
    MetricInfo(("reward_model/score_mean",), "", "mean token score", "drift to one side mutes the other"),
    MetricInfo(("MODEL/gradient_norm",), "", "before clipping; MODEL is `policy` or `reward_model`", "spikes"),
    MetricInfo(
        ("MODEL/learning_rate", "MODEL/updates"),
        "",
        "of this step; optimizer steps so far, of which the policy makes `loss.updates_per_step` a step",
        "",
    ),
    MetricInfo(("MODEL/largest_weight",), "", "largest absolute parameter", ""),
    MetricInfo(
        ("MODEL/skipped", "MODEL/consecutive_skips"),
        "updates",
        "steps that the guard skipped in the entire run; those since the last step taken",
        "any",
    ),
)

ENGINE_AND_WEIGHTS = (
    MetricInfo(
        ("parity/logprob_gap",),
        "nats",
        "largest mean difference of engine and trainer log-probs of one rollout, nats",
        "the run stops above `engine.parity_tolerance_nats`",
    ),
    MetricInfo(
        ("parity/capped_gap",),
        "nats",
        "the same with single tokens counted for at most four times the tolerance; this one is compared",
        "",
    ),
    MetricInfo(("parity/tokens",), "tokens", "compared tokens, on every rank that computes their log-probs", ""),
    MetricInfo(
        ("parity/token_gap_mean", "parity/token_gap_p99", "parity/token_gap_max"),
        "nats",
        "of the absolute difference of trainer and engine log-probs over all compared tokens, nats",
        "growth: the engine's rounding moves the policy that is sampled; a maximum of whole nats is usual in bfloat16",
    ),
    MetricInfo(
        ("parity/kl_k3",),
        "nats/token",
        "mean of exp(d) - d - 1 over the same tokens, d = trainer - engine; estimates KL(engine ‖ trainer), "
        "nats per token",
        "growth; 0 means bitwise equal log-probs. [Decision "
        "0016](../decisions/0016-importance-ratio-off-by-default.md)",
    ),
    MetricInfo(("weight_sync/direct",), "", "1 if the direct transport was used, 0 for gather", ""),
    MetricInfo(
        ("weight_sync/verified_parameters", "weight_sync/verified_tensors"),
        "",
        "engine parameters, or tensors given to its loader, whose checksum was equal",
        "a change",
    ),
    MetricInfo(
        (
            "weight_sync/sent_bytes",
            "weight_sync/received_bytes",
            "weight_sync/sent_between_bytes",
            "weight_sync/received_between_bytes",
        ),
        "bytes",
        "bytes of the busiest rank; `between`: across machines",
        "",
    ),
    MetricInfo(("weight_sync/between_nodes_bytes",), "bytes", "sum over ranks across machines", ""),
    MetricInfo(
        ("weight_sync/least_received_bytes", "weight_sync/least_between_nodes_bytes"),
        "bytes",
        "lower bounds for the layout",
        "",
    ),
)

TIME = (
    MetricInfo(
        ("seconds/PHASE",),
        "s",
        "wall clock of the first rank in a phase: `generate`, `verify` (grading that did not overlap), "
        "`parity`, `reward_model`, `reference`, `policy`, `weight_sync`, `checkpoint`, `evaluate`; "
        "`seconds/step` is the step without evaluations",
        "",
    ),
    MetricInfo(
        ("speed/tokens_per_second_per_gpu/PHASE",),
        "tokens/s",
        "tokens of prompts and responses that the phase processed, per second and GPU; for the step: of all rollouts",
        "a fall while lengths stay",
    ),
    MetricInfo(
        ("speed/tflops_per_second_per_gpu/PHASE",),
        "TFLOP/s",
        "operations of the model in the phase, per second and GPU; recomputation is not counted",
        "",
    ),
    MetricInfo(
        ("speed/mfu/PHASE",),
        "0 to 1",
        "operations per second and GPU over the peak of the GPU; absent if that is unknown",
        "",
    ),
    MetricInfo(
        ("speed/share/PART",),
        "0 to 1",
        "share of the step spent in generation, verification, training, weight sync and the rest",
        "`verify`: more workers or a faster judge",
    ),
    MetricInfo(
        ("speed/idle/PART",),
        "0 to 1",
        "share of its time that the mean rank waits for the slowest one",
        "`generate`: responses of very different lengths",
    ),
    MetricInfo(
        ("speed/bubble",),
        "0 to 1",
        "ideal bubble of the pipeline schedule, with a fill and a drain for each update",
        "more micro-batches lower it, more mini-batches raise it",
    ),
    MetricInfo(
        ("weight_sync/gigabytes_per_second",),
        "GB/s",
        "bytes received by the busiest rank over the seconds of the weight sync",
        "",
    ),
)

OWN = (MetricInfo(("own/NAME",), "", "from `record.metric` or `loss.term` ([Extend a run](../how_to/extensions.md))"),)

SECTIONS = {
    "What was sampled": SAMPLED,
    "Speculative decoding": SPECULATION,
    "Partial rollouts": PARTIAL_ROLLOUTS,
    "Losses and models": LOSSES_AND_MODELS,
    "Engine and weights": ENGINE_AND_WEIGHTS,
    "Time": TIME,
    "Your own": OWN,
}
METRICS = tuple(info for section in SECTIONS.values() for info in section)


@cache
def find(name: str) -> MetricInfo | None:
    """Return the row that explains a metric, None for one that is not in the table."""
    return next((info for info in METRICS if any(_pattern(known).fullmatch(name) for known in info.names)), None)


@cache
def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(f"({'|'.join(PLACEHOLDERS)})", name)
    return re.compile("".join(PLACEHOLDERS.get(part) or re.escape(part) for part in parts))


def plain_meaning(name: str) -> str:
    """Return the meaning of a metric without Markdown; empty for an unknown one."""
    info = find(name)
    return re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", info.meaning) if info else ""
