"""Sections of the algorithm: data, sampling, selection, token weights, loss, optimizers, evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from oreal_megatron.config.exploration import PenaltyConfig
from oreal_megatron.config.schema import FixedKey, FreeKey, FunctionKey, InputKey, Key, Section

KEY_FIELDS = ("question", "gold_answer", "pass_rate", "response")  # that data.keys may name


@dataclass(frozen=True)
class SamplingConfig(Section):
    """Sampling of the responses that a step trains on."""

    rollouts_per_prompt: Annotated[int, Key("responses sampled per prompt; advantages compare them", low=2)] = 16
    temperature: Annotated[
        float, Key("sampling temperature; policy and reference divide their logits by it as well", 0.01, 2.0)
    ] = 1.0
    top_p: Annotated[
        float, Key("probability mass that sampling draws from; log-probs are of the whole distribution", 0.001, 1.0)
    ] = 0.9
    min_p: Annotated[
        float,
        Key("tokens below so many times the likeliest one's probability are not sampled; log-probs as top_p's", 0, 1),
    ] = 0.0
    max_new_tokens: Annotated[int, Key("longest response; a longer one is cut off", low=1, unit="tokens")] = 14000


@dataclass(frozen=True)
class DataConfig(Section):
    """Problems: lines with question, gold_answer and pass_rate (the schema of OREAL-RL-Prompts)."""

    path: Annotated[str, InputKey("problems to train on: file.jsonl, file.parquet or hub:OWNER/DATASET:FILE")] = ""
    held_out: Annotated[str, InputKey("problems to evaluate on, likewise; empty: no evaluation")] = ""
    prompts_per_step: Annotated[int, FixedKey("problems of a step", low=1)] = 64
    system_prompt: Annotated[str, FixedKey("system message of every prompt; empty: that of the chat template")] = ""
    keys: Annotated[
        dict[str, Any],
        FixedKey(
            "keys of foreign files, e.g. data.keys.question=prompt, data.keys.gold_answer=reward_model.ground_truth"
        ),
    ] = field(default_factory=dict)
    filter_overlong: Annotated[
        bool,
        FixedKey(
            "skip problems that leave no room for a boxed answer in engine.max_model_len, instead of refusing them"
        ),
    ] = False
    drop_unreadable_golds: Annotated[
        bool,
        FixedKey("skip problems whose gold answer the verifier cannot equate with itself, instead of refusing them"),
    ] = False
    buckets: Annotated[
        tuple[tuple[float, float, int], ...],
        FixedKey("(low, high, times): a problem with low <= pass rate < high is used so many times in an epoch"),
    ] = ((0.0, 0.2, 6), (0.2, 0.4, 4), (0.4, 0.6, 4), (0.6, 0.8, 2))
    reader: Annotated[
        str,
        FunctionKey(
            "function path/to/file.py:NAME of (path) that returns rows of both files as dictionaries; empty: none",
            arguments=("path",),
        ),
    ] = ""
    template: Annotated[
        str,
        FunctionKey(
            "function path/to/file.py:NAME of (question, system_prompt) that returns the prompt's text; empty: none",
            arguments=("question", "system_prompt"),
        ),
    ] = ""

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield messages about fields that do not exist, and buckets without a pass rate or a repetition."""
        for name, key in self.keys.items():
            if name not in KEY_FIELDS:
                yield f"{path}keys.{name} is unknown; expected one of {', '.join(KEY_FIELDS)}"
            elif not isinstance(key, str) or not key:
                yield f"{path}keys.{name} is {key!r}; expected the name of a key"
        if not self.buckets:
            yield f"{path}buckets is empty; expected at least one (low, high, times), e.g. ((0.0, 1.0, 1),)"
        for bucket in self.buckets:
            low, high, times = bucket
            if not (0 <= low < high and times >= 1):
                yield f"{path}buckets holds {bucket}; expected (low, high, times) with 0 <= low < high and times >= 1"


@dataclass(frozen=True)
class SelectionConfig(Section):
    """Choice of the rollouts that a step trains on, and their advantage."""

    advantage: Annotated[
        Literal["leave_one_out", "group_normalised", "reward"],
        Key("reward minus the mean of the other rollouts, (reward - mean) / standard deviation, or the reward itself"),
    ] = "leave_one_out"
    keep: Annotated[
        Literal["pair", "mixed", "all"],
        Key(
            "a correct and an incorrect rollout of each mixed prompt, all rollouts of mixed prompts, or of all prompts"
        ),
    ] = "pair"
    penalties: PenaltyConfig = field(default_factory=PenaltyConfig)
    advantage_rule: Annotated[
        str,
        FunctionKey(
            "function path/to/file.py:NAME of a prompt's (rewards), instead of selection.advantage; empty: none",
            arguments=("rewards",),
        ),
    ] = ""


@dataclass(frozen=True)
class WeightsConfig(Section):
    """Token weights from the scores of the reward model (paper, Eq. 10)."""

    belief: Annotated[
        Literal["prefix_mean", "token"],
        Key(
            "belief in the outcome at a token: sigmoid of the mean score up to it (authors' code), or of its own score"
        ),
    ] = "prefix_mean"
    rescale: Annotated[
        Literal["threshold", "top_share"],
        Key("weight tokens by the belief in their outcome above a threshold, or only those of highest belief"),
    ] = "threshold"
    threshold_correct: Annotated[
        float, Key("belief up to which a correct response's token has weight 0, for rescale=threshold", 0.0, 0.99)
    ] = 0.5
    threshold_incorrect: Annotated[
        float, Key("belief up to which an incorrect response's token has weight 0, for rescale=threshold", 0.0, 0.99)
    ] = 0.5
    top_share: Annotated[float, Key("share of a response's tokens that count, for rescale=top_share", 0.0, 1.0)] = 0.25
    credit: Annotated[
        Literal["belief", "difference"],
        Key("weigh tokens by the belief, or by (1 + d) / 2 for the change d of the belief that the token makes"),
    ] = "belief"
    shuffle: Annotated[
        bool, Key("control: permute the weights at random among the tokens of correct and of incorrect responses")
    ] = False
    rule: Annotated[
        str,
        FunctionKey(
            "function path/to/file.py:NAME of (score_T, micro_batch, config) that returns the weights; empty: none",
            arguments=("score_T", "micro_batch", "config"),
        ),
    ] = ""


@dataclass(frozen=True)
class LossConfig(Section):
    """Coefficients of the policy loss (paper, Eq. 11; values of the authors' configuration)."""

    positive_coef: Annotated[float, Key("coefficient of the correct samples' loss", low=0.0)] = 1.0
    negative_coef: Annotated[float, Key("coefficient of the incorrect samples' loss", low=0.0)] = 0.5
    kl_coef: Annotated[float, Key("coefficient of the KL divergence from the reference model", low=0.0)] = 0.01
    kl_kind: Annotated[Literal["k1", "k1_reversed", "k2", "k3"], Key("estimator of the KL divergence")] = "k3"
    reward_kl_coef: Annotated[
        float,
        Key("coefficient of a response's KL divergence in its reward, minus the mean of its prompt's others", low=0.0),
    ] = 0.0
    entropy_coef: Annotated[
        float, Key("coefficient of the entropy bonus: the policy's mean entropy over the vocabulary", low=0.0)
    ] = 0.0
    advantage_on_positives: Annotated[bool, Key("multiply the correct samples' loss by their advantage")] = True
    normalise: Annotated[
        Literal["side", "joint"],
        Key("divide correct and incorrect samples' loss each by its own tokens, or both by all tokens of the step"),
    ] = "side"
    ratio_cap: Annotated[
        float,
        Key("cap of the importance ratio trainer / engine of incorrect samples' tokens; 0: the ratio is 1", 0.0, 1e6),
    ] = 0.0
    ratio_tokens: Annotated[
        Literal["all", "carried"],
        Key("tokens with a ratio: all, or those that earlier versions of the policy wrote (rollout.carry)"),
    ] = "all"
    term: Annotated[
        str,
        FunctionKey(
            "function path/to/file.py:NAME of (logp_T, tokens, counts) whose value is added to the loss; empty: none",
            arguments=("logp_T", "tokens", "counts"),
        ),
    ] = ""
    updates_per_step: Annotated[
        int,
        FixedKey("updates of the policy on the samples of a step, equally many on each mini-batch", 1, 64),
    ] = 1
    mini_batches: Annotated[
        int,
        FixedKey(
            "parts of a step's prompts, in order, that its updates train on in turn; divides updates_per_step", 1, 64
        ),
    ] = 1

    @property
    def passes(self) -> int:
        """Number of updates on each mini-batch."""
        return self.updates_per_step // self.mini_batches

    @property
    def corrects_ratio(self) -> bool:
        """True if every token of the incorrect samples' term has its importance ratio."""
        return bool(self.ratio_cap) and self.ratio_tokens == "all"

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield messages about a cap of tokens that need no correction, and about updates that need one."""
        if 0 < self.ratio_cap < 1:
            yield (
                f"{path}ratio_cap is {self.ratio_cap:g}; expected 0 (no ratio) or at least 1, e.g. 2: a ratio of 1 "
                "must stay 1"
            )
        if self.updates_per_step > 1 and self.negative_coef and not self.corrects_ratio:
            yield (
                f"{path}updates_per_step is {self.updates_per_step}, and the built-in term of incorrect samples takes "
                "the importance ratio as 1, which holds for the first update only; set "
                f"{path}ratio_cap, e.g. to 2, with {path}ratio_tokens=all, or {path}negative_coef=0 beside a "
                f"{path}term with a clipped ratio (examples/recipes/grpo.py), or {path}updates_per_step=1"
            )
        if self.updates_per_step % self.mini_batches:
            yield (
                f"{path}mini_batches is {self.mini_batches} and {path}updates_per_step {self.updates_per_step}: each "
                "mini-batch needs equally many updates; set updates_per_step to a multiple of mini_batches"
            )


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: Annotated[float, Key("peak learning rate", 0.0, 10.0)] = 5e-7
    min_lr: Annotated[float, Key("rate of the last update, after cosine decay", 0.0, 10.0)] = 1e-7
    warmup_steps: Annotated[int, Key("steps of linear warm-up", low=0)] = 10
    weight_decay: Annotated[float, Key("decoupled weight decay", 0.0, 10.0)] = 0.01
    clip_grad: Annotated[float, Key("largest gradient norm; 0: gradients are not clipped", low=0.0)] = 1.0
    adam_beta1: Annotated[float, Key("decay of the first moment", 0.0, 0.99999)] = 0.9
    adam_beta2: Annotated[float, Key("decay of the second moment", 0.0, 0.99999)] = 0.999

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield a message if the learning rate would rise instead of decaying."""
        if self.min_lr > self.lr:
            yield f"{path}min_lr is {self.min_lr:g}, above {path}lr, which is {self.lr:g}; set it to at most {path}lr"


@dataclass(frozen=True)
class RewardModelConfig(Section):
    """The token-level reward model; without it every token has weight 1."""

    enabled: Annotated[bool, FixedKey("train and use the token-level reward model")] = True
    path: Annotated[
        str,
        InputKey(
            "Hugging Face folder of a trained reward model, from `oreal reward-model`; empty: the policy's layers"
        ),
    ] = ""
    score_at: Annotated[
        Literal["token", "before"],
        Key("score a token after reading it (paper, w(s_<=t)), or before (authors' code)"),
    ] = "token"
    objective: Annotated[
        Literal["mean", "prefix"],
        Key("cross entropy of the mean score's belief (paper, Eq. 12), or of weights.belief at every token"),
    ] = "mean"
    head_init: Annotated[
        Literal["zeros", "normal"],
        FixedKey("first weights of the scalar head: zeros (authors' code), or normal with standard deviation 0.02"),
    ] = "zeros"
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-6, min_lr=4e-7))


@dataclass(frozen=True)
class RewardTrainingConfig(Section):
    """Training of the reward model before reinforcement learning, with `oreal reward-model`."""

    path: Annotated[str, InputKey("rollouts with verdicts: JSONL of `oreal evaluate --rate`, or a run folder")] = ""
    steps: Annotated[int, Key("most updates", low=1)] = 500
    pairs_per_step: Annotated[int, FixedKey("pairs of a correct and an incorrect rollout of one prompt", low=1)] = 64
    held_out_share: Annotated[float, FixedKey("share of the prompts that only evaluations use", 0.01, 0.9)] = 0.1
    evaluate_every: Annotated[int, FreeKey("steps between two evaluations", low=1)] = 25
    patience: Annotated[
        int, Key("evaluations in a row without a higher held-out AUC that end the training; 0: no early stop", low=0)
    ] = 4
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-6, min_lr=4e-7))

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield a message if the peak learning rate would never be reached."""
        if self.path and self.optimizer.warmup_steps > self.steps:
            yield (
                f"{path}optimizer.warmup_steps is {self.optimizer.warmup_steps}, but at most {self.steps} updates are "
                f"taken ({path}steps); set it to at most {self.steps}"
            )


@dataclass(frozen=True)
class GuardConfig(Section):
    """Skipping of updates whose loss or gradient is not finite, or whose gradient norm is a spike."""

    max_consecutive_skips: Annotated[int, Key("skipped updates of one model in a row that stop the run", low=1)] = 5
    spike_factor: Annotated[
        float, Key("a gradient norm above so many times the running median is a spike; 0: none is", 0.0, 1e6)
    ] = 0.0
    spike_window: Annotated[
        int, Key("updates that the median is taken over; before there are so many, nothing is a spike", 1, 10000)
    ] = 20


@dataclass(frozen=True)
class EvaluationConfig(Section):
    """Evaluation on the held-out problems during training."""

    every: Annotated[int, FreeKey("steps between two evaluations; 0: none during training", low=0)] = 10
    problems: Annotated[int, FixedKey("use only the first so many held-out problems; 0: all", low=0)] = 0
    max_new_tokens: Annotated[int, Key("longest response in evaluation", low=1, unit="tokens")] = 14000
    samples: Annotated[
        int, Key("responses sampled per held-out problem beside the greedy one; 0: greedy only", 0, 1024)
    ] = 0
    temperature: Annotated[float, Key("temperature of these; 0: sampling.temperature", 0.0, 2.0)] = 0.0

    @property
    def figure(self) -> str:
        """Key of evaluations.jsonl that tells which policy is best: that of samples if there are any."""
        return "sampled_accuracy" if self.samples else "accuracy"


@dataclass(frozen=True)
class SupervisedConfig(Section):
    """Supervised fine-tuning with `oreal sft`: cross entropy on JSONL with question and response."""

    path: Annotated[str, InputKey("JSONL file of the demonstrations")] = ""
    steps: Annotated[int, Key("updates", low=1)] = 1000
    samples_per_step: Annotated[int, FixedKey("demonstrations of a step", low=1)] = 128
    evaluate_every: Annotated[
        int, FreeKey("steps between two evaluations, also before the first step; 0: none, and no engine", low=0)
    ] = 0
    checkpoint_every: Annotated[
        int, FreeKey("steps between two checkpoints; 0: after the last step, and when a signal stops the run", low=0)
    ] = 0
    stop_at_accuracy: Annotated[
        float, Key("stop when greedy held-out accuracy reaches it; needs evaluate_every", 0.0, 1.0)
    ] = 1.0
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, min_lr=1e-6))

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield a message if the peak learning rate would never be reached."""
        if self.path and self.optimizer.warmup_steps > self.steps:
            yield (
                f"{path}optimizer.warmup_steps is {self.optimizer.warmup_steps}, but only {self.steps} updates are "
                f"taken ({path}steps); set it to at most {self.steps}"
            )
