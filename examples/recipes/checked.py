"""Recipes of the checked task: running sums modulo 10 with a written check after each step, on CPU processes.

tools/make_checked_task.py makes the inputs, tools/checked_steps.py shows the text.
"""

import dataclasses

from oreal_megatron.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RewardModelConfig,
    SamplingConfig,
    SupervisedConfig,
    VerifyConfig,
)

FOLDER = "runs/checked"


def oreal() -> Config:
    """OREAL with the token-level reward model, from the supervised policy."""
    return Config(
        run=f"{FOLDER}/oreal",
        steps=150,
        policy_freeze_steps=10,
        tokens_per_micro_batch=4096,
        model=ModelConfig(f"{FOLDER}/sft/policy"),
        engine=EngineConfig(max_model_len=64, max_num_seqs=512, kv_cache_gib=0.5, enforce_eager=True),
        sampling=SamplingConfig(rollouts_per_prompt=16, temperature=1.0, top_p=1.0, max_new_tokens=28),
        data=DataConfig(f"{FOLDER}/problems.jsonl", f"{FOLDER}/held_out.jsonl", prompts_per_step=32),
        verify=VerifyConfig(workers=1),
        optimizer=OptimizerConfig(lr=3e-4, min_lr=6e-5, warmup_steps=10),
        reward_model=RewardModelConfig(optimizer=OptimizerConfig(lr=1e-3, min_lr=2e-4, warmup_steps=10)),
        checkpoint=CheckpointConfig(every=0),
        evaluation=EvaluationConfig(every=25, problems=1000, max_new_tokens=28),
    )


def oreal_without_reward_model() -> Config:
    """OREAL with a weight of 1 for every token; the policy is trained from the first step."""
    return dataclasses.replace(
        oreal(), run=f"{FOLDER}/without_reward_model", reward_model=RewardModelConfig(enabled=False)
    )


def sft() -> Config:
    """Supervised fine-tuning of the random policy until it writes steps and checks as the demonstrations do."""
    return dataclasses.replace(
        oreal(),
        run=f"{FOLDER}/sft",
        model=ModelConfig(f"{FOLDER}/start"),
        data=DataConfig(held_out=f"{FOLDER}/problems.jsonl"),
        tokens_per_micro_batch=8192,
        evaluation=EvaluationConfig(problems=300, max_new_tokens=28),
        supervised=SupervisedConfig(
            path=f"{FOLDER}/demonstrations.jsonl",
            steps=1000,
            samples_per_step=128,
            evaluate_every=100,
            optimizer=OptimizerConfig(lr=2e-3, min_lr=2e-4, warmup_steps=50),
        ),
    )
