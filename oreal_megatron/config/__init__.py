"""Configuration of a run: one tree of frozen dataclasses, whose fields declare choices, bounds and meaning."""

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
from oreal_megatron.config.errors import ConfigError, Preempted, RunStopped
from oreal_megatron.config.exploration import PenaltyConfig, ReferenceConfig
from oreal_megatron.config.generation import RolloutConfig
from oreal_megatron.config.root import Config, require_judge
from oreal_megatron.config.schema import Key, Section, problems, validate
from oreal_megatron.config.speculative import SpeculativeConfig
from oreal_megatron.config.system import (
    CheckpointConfig,
    EngineConfig,
    JudgeConfig,
    ModelConfig,
    ParallelConfig,
    RecordConfig,
    VerifyConfig,
    WatchdogConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistillationConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GuardConfig",
    "JudgeConfig",
    "Key",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PenaltyConfig",
    "Preempted",
    "RecordConfig",
    "ReferenceConfig",
    "RewardModelConfig",
    "RewardTrainingConfig",
    "RolloutConfig",
    "RunStopped",
    "SamplingConfig",
    "Section",
    "SelectionConfig",
    "SpeculativeConfig",
    "SupervisedConfig",
    "VerifyConfig",
    "WatchdogConfig",
    "WeightsConfig",
    "problems",
    "require_judge",
    "validate",
]
