"""Recipes of examples/addition.sh: three-digit addition with a 0.8 M-parameter policy, on two CPU processes."""

import dataclasses

from oreal_megatron.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardModelConfig,
    SamplingConfig,
    SupervisedConfig,
    VerifyConfig,
    WeightsConfig,
)

FOLDER = "runs/addition"


def oreal() -> Config:
    """OREAL with the token-level reward model, from the supervised policy."""
    return Config(
        run=f"{FOLDER}/oreal",
        steps=150,
        policy_freeze_steps=10,
        tokens_per_micro_batch=4096,
        model=ModelConfig(f"{FOLDER}/sft/policy"),
        parallel=ParallelConfig(tensor=1, pipeline=1),
        engine=EngineConfig(tensor=1, max_model_len=64, max_num_seqs=512, kv_cache_gib=0.5, enforce_eager=True),
        sampling=SamplingConfig(rollouts_per_prompt=16, temperature=1.0, top_p=1.0, max_new_tokens=16),
        data=DataConfig(f"{FOLDER}/rated.jsonl", f"{FOLDER}/held_out.jsonl", prompts_per_step=64),
        verify=VerifyConfig(workers=1),
        # The reward model of such a small policy is hardly better than chance after so few steps. With the paper's
        # threshold of 0.5 nearly all token weights would be 0; with 0.25 a token with score 0.5 has weight 1/3.
        weights=WeightsConfig(threshold_correct=0.25, threshold_incorrect=0.25),
        optimizer=OptimizerConfig(lr=3e-4, min_lr=5e-5, warmup_steps=10),
        reward_model=RewardModelConfig(optimizer=OptimizerConfig(lr=1e-3, min_lr=2e-4, warmup_steps=10)),
        checkpoint=CheckpointConfig(every=50, keep=2),
        evaluation=EvaluationConfig(every=25, max_new_tokens=16),
    )


def oreal_without_reward_model() -> Config:
    """OREAL with a weight of 1 for every token; the policy is trained from the first step."""
    return dataclasses.replace(
        oreal(), run=f"{FOLDER}/without_reward_model", reward_model=RewardModelConfig(enabled=False)
    )


def sft() -> Config:
    """Supervised fine-tuning of the random policy until it solves about a third of the held-out problems."""
    return dataclasses.replace(
        oreal(),
        run=f"{FOLDER}/sft",
        model=ModelConfig(f"{FOLDER}/start"),
        data=DataConfig(held_out=f"{FOLDER}/problems.jsonl"),  # without demonstrations; held_out.jsonl stays unseen
        evaluation=EvaluationConfig(problems=300, max_new_tokens=16),
        supervised=SupervisedConfig(
            path=f"{FOLDER}/demonstrations.jsonl",
            steps=800,
            samples_per_step=128,
            evaluate_every=10,
            stop_at_accuracy=0.3,
            optimizer=OptimizerConfig(lr=2e-3, min_lr=2e-4, warmup_steps=50),
        ),
    )
