"""The root of the configuration. Recipes are Python functions that build it; derived numbers are properties."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from oreal_megatron.config.algorithm import (
    DataConfig,
    EvaluationConfig,
    GuardConfig,
    LossConfig,
    OptimizerConfig,
    RewardModelConfig,
    RewardTrainingConfig,
    SamplingConfig,
    SelectionConfig,
    SupervisedConfig,
    WeightsConfig,
)
from oreal_megatron.config.distillation import DistillationConfig
from oreal_megatron.config.errors import ConfigError
from oreal_megatron.config.exploration import ReferenceConfig
from oreal_megatron.config.generation import RolloutConfig
from oreal_megatron.config.schema import FixedKey, FreeKey, Key, Section
from oreal_megatron.config.system import (
    CheckpointConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    RecordConfig,
    VerifyConfig,
    WatchdogConfig,
)


@dataclass(frozen=True)
class Config(Section):
    """Everything that a run depends on."""

    run: Annotated[str, FreeKey("run folder")] = "runs/oreal"
    gpus: Annotated[int, FreeKey("GPUs that the recipe is made for, which `oreal plan` reads; 0: unknown", low=0)] = 0
    seed: Annotated[int, FixedKey("seed of data order, sampling and new weights", 0, 2**32 - 1)] = 0
    steps: Annotated[int, Key("steps of the run", low=1)] = 90
    policy_freeze_steps: Annotated[
        int, Key("first steps, which train the reward model alone", low=0)
    ] = 10  # fmt: skip
    policy_schedule: Annotated[
        Literal["steps", "updates"],
        Key("the policy's learning rate counts the frozen steps too (authors' code), or the policy's updates only"),
    ] = "steps"
    tokens_per_micro_batch: Annotated[
        int, Key("tokens of a packed micro-batch; a longer sequence gets its own", low=1, unit="tokens")
    ] = 16384
    offload: Annotated[bool, FreeKey("move idle models to host memory: parameters, gradients and optimizer states")] = (
        False
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    reward_training: RewardTrainingConfig = field(default_factory=RewardTrainingConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    record: RecordConfig = field(default_factory=RecordConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    megatron: Annotated[
        dict[str, Any], Key("further fields of Megatron's TransformerConfig, passed on as they are")
    ] = field(default_factory=dict)

    @property
    def frozen_steps(self) -> int:
        """First steps without an update of the policy; none without a reward model."""
        return self.policy_freeze_steps if self.reward_model.enabled else 0

    @property
    def policy_schedule_steps(self) -> int:
        """Length of the policy's learning-rate schedule."""
        return self.steps if self.policy_schedule == "steps" else self.steps - self.frozen_steps

    @property
    def parity_tolerance_nats(self) -> float:
        """Tolerance of the logprob parity check in nats, by precision where the recipe names none."""
        if self.engine.parity_tolerance_nats is not None:
            return self.engine.parity_tolerance_nats
        return 1e-4 if self.model.dtype == self.engine_dtype == "float32" else 0.1

    @property
    def wide_reference(self) -> bool:
        """True if a moving reference needs an average in float32 beside its parameters."""
        return 0 < self.reference.decay < 1 and self.model.dtype != "float32"

    @property
    def engine_dtype(self) -> str:
        """Precision of the engine's weights."""
        return self.engine.dtype or self.model.dtype

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield messages about a run folder that cannot be meant, and keys that contradict each other."""
        if not self.run.strip() or self.run.startswith("~"):
            yield f"run is {self.run!r}; expected the path of a folder, written out: only a shell replaces ~"
        if self.frozen_steps >= self.steps:
            yield (
                f"policy_freeze_steps is {self.policy_freeze_steps} and steps is {self.steps}: the policy would never "
                "be trained; set policy_freeze_steps below steps"
            )
            return
        yield from self._warmup_conflicts()
        yield from self._idle_conflicts()
        if self.weights.shuffle and not self.reward_model.enabled:
            yield (
                "weights.shuffle is true, but without a reward model there are no weights to permute; set "
                "reward_model.enabled=true or weights.shuffle=false"
            )
        yield from self._ratio_conflicts()
        if self.loss.reward_kl_coef and self.selection.keep == "pair":
            yield (
                "loss.reward_kl_coef is above 0, which compares the KL divergences of all rollouts of a prompt, but "
                "selection.keep=pair trains on two of them; set selection.keep to mixed or all"
            )
        if self.loss.reward_kl_coef and not self.loss.advantage_on_positives:
            yield (
                "loss.reward_kl_coef changes advantages, which correct samples ignore with "
                "loss.advantage_on_positives=false; set that to true"
            )
        if self.engine.batch_invariant and not self.megatron.get("deterministic_mode"):
            yield (
                "engine.batch_invariant is true, but the trainer's kernels may sum in any order; set "
                "megatron.deterministic_mode=true as well, or engine.batch_invariant=false"
            )
        if self.engine.speculative.enabled and self.sampling.min_p > 0:
            yield (
                f"sampling.min_p is {self.sampling.min_p:g} and engine.speculative.method "
                f"{self.engine.speculative.method}: vLLM takes no min_p with speculative decoding; unset one of them"
            )
        judge, limit_s = self.verify.judge, self.watchdog.verify_s
        if judge.urls and limit_s <= judge.all_down_wait_s:
            yield (
                f"watchdog.verify_s is {limit_s:g}, but a step may wait {judge.all_down_wait_s:g} s for judges "
                "(verify.judge.all_down_wait_s); set it above that"
            )

    def _idle_conflicts(self) -> Iterator[str]:
        """Yield messages about a loss and learning rates with which no step would change a model."""
        loss, reward_model = self.loss, self.reward_model
        if not (loss.positive_coef or loss.negative_coef or loss.entropy_coef or loss.term):
            yield (
                "loss.positive_coef, loss.negative_coef and loss.entropy_coef are 0: the KL divergence alone keeps the "
                "policy where it starts; set one of them above 0, or name a loss.term"
            )
        if not self.optimizer.lr:
            yield "optimizer.lr is 0: the policy would never change; set it above 0"
        if reward_model.enabled and not reward_model.path and not reward_model.optimizer.lr:
            yield (
                "reward_model.optimizer.lr is 0: a new reward model would never learn; set it above 0, start from a "
                "trained one with reward_model.path, or set reward_model.enabled=false"
            )
        for name, section in (("supervised", self.supervised), ("reward_training", self.reward_training)):
            if section.path and not section.optimizer.lr:
                yield f"{name}.optimizer.lr is 0: the model would never change; set it above 0"

    def _ratio_conflicts(self) -> Iterator[str]:
        """Yield messages about importance ratios that would correct nothing, and about missing ones."""
        loss = self.loss
        if loss.ratio_cap and loss.ratio_tokens == "all" and (self.sampling.top_p < 1 or self.sampling.min_p > 0):
            yield (
                f"loss.ratio_cap is {loss.ratio_cap:g}, sampling.top_p {self.sampling.top_p:g} and sampling.min_p "
                f"{self.sampling.min_p:g}: the engine's log-probs are of the whole distribution, which top_p below 1 "
                "and min_p above 0 do not sample from; set sampling.top_p=1.0 and sampling.min_p=0, loss.ratio_cap=0, "
                "or loss.ratio_tokens=carried, which compares two versions of the policy"
            )
        if self.rollout.version_limit and not loss.ratio_cap:
            yield (
                "rollout.carry lets earlier versions of the policy write the first tokens of a response, and "
                "loss.ratio_cap is 0: incorrect samples need their importance ratio; set loss.ratio_cap, e.g. to 2, or "
                "rollout.carry=false"
            )
        if loss.mini_batches > self.data.prompts_per_step:
            yield (
                f"loss.mini_batches is {loss.mini_batches}, but a step has {self.data.prompts_per_step} prompts "
                "(data.prompts_per_step); set it to at most that"
            )
        if self.rollout.version_limit and loss.updates_per_step > 1:
            yield (
                f"loss.updates_per_step is {loss.updates_per_step} and rollout.carry is true: rollout.staleness counts "
                "versions of the policy, of which there is one a step; set loss.updates_per_step=1 or "
                "rollout.carry=false"
            )

    def _warmup_conflicts(self) -> Iterator[str]:
        """Yield a message for each warm-up that is longer than its schedule."""
        sum_of = "steps" if self.policy_schedule == "steps" else "steps - policy_freeze_steps"
        schedules = {"optimizer": (self.optimizer, self.policy_schedule_steps, sum_of)}
        if self.reward_model.enabled:
            schedules["reward_model.optimizer"] = (self.reward_model.optimizer, self.steps, "steps")
        for name, (optimizer, length, sum_of) in schedules.items():
            if optimizer.warmup_steps > length:
                yield (
                    f"{name}.warmup_steps is {optimizer.warmup_steps}, but its schedule has only {length} steps "
                    f"({sum_of}); set it to at most {length}"
                )


def require_judge(config: Config) -> None:
    """Raise ConfigError if the recipe needs a judge and none is named; planning a run needs none."""
    if config.verify.judge.required and not config.verify.judge.urls:
        raise ConfigError(
            "the recipe requires a judge, and verify.judge.urls names none; set OREAL_JUDGE_URLS=http://HOST:PORT,... "
            "(servers of an OpenAI-compatible API, as of `vllm serve`), or to none to verify by the rules alone"
        )
