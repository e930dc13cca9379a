"""One tree of frozen dataclasses. Recipes are Python functions that build it; derived numbers are properties."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """Bad input found before anything was loaded; the message is a sentence for the user (exit code 2)."""


class RunStopped(RuntimeError):
    """The run cannot honestly go on, and can be resumed; the message is a sentence for the user (exit code 3).

    Raised on all ranks at once, so that none is left waiting for the others.
    """


class Preempted(RunStopped):
    """The run was asked to leave in the middle of a step; it can be resumed (exit code 4). Raised on all ranks."""


@dataclass(frozen=True)
class JudgeConfig:
    """LLM judge behind an OpenAI-compatible API, asked where the rules say WRONG. No URL: no judge."""

    urls: tuple[str, ...] = ()
    required: bool = False  # refuse to start without a URL
    model: str = ""
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0
    retries: int = 3
    concurrency: int = 64  # requests under way at once, all hosts together
    all_down_wait_s: float = 600.0  # how long a step waits when every host is down before the run stops
    max_answer_chars: int = 500  # of the extracted answer shown to the judge
    cache: str = ""  # verdict cache file that survives a restart; empty: memory only


@dataclass(frozen=True)
class VerifyConfig:
    """How answers are graded."""

    workers: int = 2  # grading processes of each rank that holds rollouts
    timeout_s: float = 2.0  # per answer, enforced by killing the worker
    memory_mib: int = 1024  # per worker
    thinking_end: tuple[str, ...] = ("</think>",)  # the answer is looked for after the last of these
    unknown_limit: float = 0.2  # the run stops when a larger share of a step's verdicts is UNKNOWN
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass(frozen=True)
class ModelConfig:
    """The starting policy, a Hugging Face folder; reward model and reference start from it as well."""

    path: str = ""
    dtype: str = "float32"  # "float32" or "bfloat16"
    layers: str = "local"  # Megatron's and our modules; or "transformer_engine": its fused ones, where it is installed
    logits_mib: int = 1024  # memory that the output layer may fill with logits
    trust_remote_code: bool = False  # run the Python code of a tokenizer that brings some


@dataclass(frozen=True)
class ParallelConfig:
    """How Megatron cuts the models; data-parallel size is what remains of the world."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1  # interleaved chunks of layers on each pipeline stage; above 1 it needs pipeline above 1
    context: int = 1  # ranks that share every packed sequence
    sequence: bool = False  # norms and residuals cut by sequence over the tensor-parallel ranks; needs tensor above 1
    overlap: bool = False  # data-parallel ranks sum gradients, and gather weights, while micro-batches compute

    def bubble(self, micro_batches: int) -> float:
        """Share of a pass over so many micro-batches in which pipeline stages wait for each other, at best."""
        waiting = self.pipeline - 1
        return waiting / (micro_batches * self.virtual + waiting)


@dataclass(frozen=True)
class EngineConfig:
    """The colocated vLLM engine: replicas of `tensor` consecutive ranks each."""

    tensor: int = 1
    max_model_len: int = 16384  # prompt and response, tokens
    max_num_seqs: int = 256
    kv_cache_gib: float = 1.0  # per rank
    dtype: str = ""  # of its weights; empty: as the model's. bfloat16 engines serve a float32 trainer
    transport: str = "direct"  # how weights reach it; "gather": full tensors, through vLLM's own loader
    buffer_mib: int = 512  # extra memory of the direct transport, per rank
    sleep: bool = True  # give its memory to the trainer while it trains, where the platform can (a CPU cannot)
    enforce_eager: bool = False
    retries: int = 1  # how often a step's answers that an engine failed to give are asked for again
    parity_rollouts: int = 2  # answers of each replica whose log-probs are compared with the trainer's, every step
    parity_tokens: int = 64  # at most so many tokens of each
    parity_tolerance_nats: float | None = (
        None  # nats, mean |difference| of an answer; None: 1e-4 in float32, 0.1 in bfloat16
    )


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are sampled (papers.md, section 1.7)."""

    rollouts_per_prompt: int = 16
    temperature: float = 1.0
    top_p: float = 0.9
    max_new_tokens: int = 14000


@dataclass(frozen=True)
class DataConfig:
    """Prompts: JSONL with question, gold_answer and pass_rate (the schema of OREAL-RL-Prompts)."""

    path: str = ""
    held_out: str = ""  # JSONL of problems to evaluate on; empty: no evaluation
    prompts_per_step: int = 64
    system_prompt: str = ""
    drop_unreadable_golds: bool = False  # leave out prompts whose gold answer the verifier cannot equate with itself
    buckets: tuple[tuple[float, float, int], ...] = ((0.0, 0.2, 6), (0.2, 0.4, 4), (0.4, 0.6, 4), (0.6, 0.8, 2))


@dataclass(frozen=True)
class SelectionConfig:
    """Which answers are trained on, and their advantage."""

    advantage: str = "leave_one_out"  # or "group_normalised"
    keep: str = "pair"  # "pair": one right and one wrong answer per prompt; "all": every answer of a mixed prompt


@dataclass(frozen=True)
class WeightsConfig:
    """How reward-model scores become token weights (paper, Eq. 10)."""

    rescale: str = "threshold"  # or "top_share"
    threshold: float = 0.5
    top_share: float = 0.25


@dataclass(frozen=True)
class LossConfig:
    """Coefficients of the policy loss (paper, Eq. 11; values of the authors' configuration)."""

    positive_coef: float = 1.0
    negative_coef: float = 0.5
    kl_coef: float = 0.01
    kl_kind: str = "k3"  # k1, k1_reversed, k2, k3
    advantage_on_positives: bool = True


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 5e-7
    min_lr: float = 1e-7
    warmup_steps: int = 10
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999


@dataclass(frozen=True)
class RewardModelConfig:
    """The token-level reward model; disabled, every token weighs 1."""

    enabled: bool = True
    score_at: str = "token"  # "token": after reading the token (paper, w(s_<=t)); "before": authors' code
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-6, min_lr=4e-7))


@dataclass(frozen=True)
class GuardConfig:
    """Steps that are not taken: loss, score or gradient is not finite, or the gradient is a spike."""

    max_consecutive_skips: int = 5  # of one model, at which the run stops
    spike_factor: float = 0.0  # a gradient norm above so many times the running median is a spike; 0: none is
    spike_window: int = 20  # steps taken that the median is of; until there are so many, nothing is a spike


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 10  # steps; 0: only at the end
    keep: int = 3  # newest checkpoints kept
    keep_every: int = 0  # steps; checkpoints at multiples of it stay as well; 0: none


@dataclass(frozen=True)
class WatchdogConfig:
    """Seconds that a rank may go without a beat before the job ends with exit code 5 (runtime/watchdog.py).

    Beats are engine steps, micro-batches, graded answers, and the borders of phases. A rank that waits for others in a
    collective is not counted as long as one of them goes on.
    """

    every_s: float = 1.0  # between two looks at all ranks; 0: no watchdog
    silent_s: float = 120.0  # without a word from a rank's process: stopped, or its host is gone
    start_s: float = 3600.0  # until the first step: loading, compiling
    generate_s: float = 600.0
    verify_s: float = 1800.0  # more than verify.judge.all_down_wait_s
    reward_model_s: float = 1800.0
    reference_s: float = 1800.0
    policy_s: float = 1800.0
    checkpoint_s: float = 3600.0
    other_s: float = 1800.0  # everything else
    collective_s: float = 7200.0  # time-out of the process groups, which know no phases: the outer bound


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = 10  # steps; 0: never during training
    problems: int = 0  # the first so many held-out problems; 0: all of them
    max_new_tokens: int = 14000


@dataclass(frozen=True)
class SupervisedConfig:
    """`oreal sft`: cross entropy on demonstrations (JSONL with question and response)."""

    path: str = ""
    steps: int = 1000
    samples_per_step: int = 128
    evaluate_every: int = 0  # steps; 0: never (no engine is started)
    stop_at_accuracy: float = 1.0  # stop once greedy held-out accuracy reaches it; needs evaluate_every
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, min_lr=1e-6))


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    run: str = "runs/oreal"  # run folder
    gpus: int = 0  # that the recipe was made for (`oreal plan` takes it); it runs on others that its layout allows
    seed: int = 0
    steps: int = 90
    policy_freeze_steps: int = 10  # the first steps train the reward model alone
    tokens_per_micro_batch: int = 16384  # sequences are packed up to this; a longer one stands alone
    offload: bool = False  # idle models leave the device: parameters, gradients and optimizer state
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    megatron: dict[str, Any] = field(default_factory=dict)  # further TransformerConfig fields, passed through

    @property
    def frozen_steps(self) -> int:
        """Without a reward model there is nothing to wait for."""
        return self.policy_freeze_steps if self.reward_model.enabled else 0

    @property
    def parity_tolerance_nats(self) -> float:
        if self.engine.parity_tolerance_nats is not None:
            return self.engine.parity_tolerance_nats
        return 1e-4 if self.model.dtype == self.engine_dtype == "float32" else 0.1

    @property
    def engine_dtype(self) -> str:
        return self.engine.dtype or self.model.dtype
