"""Every part of T1 on three-digit addition, from nothing on two CPU processes: the recipes of examples/t1.sh.

`sft` teaches the random policy until it solves a third of the problems, `rft` fine-tunes it on its correct responses,
`reinforce` trains it on the problems that it solves seldom. OREAL_T1_FOLDER names another folder than runs/t1/seed_0.
"""

import dataclasses
import os

import t1  # beside this file

from oreal_megatron.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ReferenceConfig,
    RewardModelConfig,
    SamplingConfig,
    SupervisedConfig,
    VerifyConfig,
)

FOLDER = os.environ.get("OREAL_T1_FOLDER", "runs/t1/seed_0")


def reinforce() -> Config:
    """T1's reinforcement learning: 32 responses at temperature 1.2, penalties, KL in the reward, entropy bonus."""
    return Config(
        run=f"{FOLDER}/reinforce",
        steps=60,
        policy_freeze_steps=0,
        tokens_per_micro_batch=4096,
        model=ModelConfig(f"{FOLDER}/rft/policy"),
        engine=EngineConfig(max_model_len=64, max_num_seqs=512, kv_cache_gib=0.5, enforce_eager=True),
        sampling=SamplingConfig(rollouts_per_prompt=32, temperature=1.2, top_p=1.0, min_p=0.02, max_new_tokens=16),
        data=DataConfig(
            f"{FOLDER}/hard.jsonl", f"{FOLDER}/held_out.jsonl", prompts_per_step=32, buckets=((0.0, 0.31, 1),)
        ),
        verify=VerifyConfig(workers=1),
        selection=t1.SELECTION,
        loss=t1.LOSS,
        reference=ReferenceConfig(decay=0.9),
        optimizer=OptimizerConfig(lr=3e-4, min_lr=5e-5, warmup_steps=10),
        reward_model=RewardModelConfig(enabled=False),
        checkpoint=CheckpointConfig(every=20, keep=2),
        evaluation=EvaluationConfig(every=20, max_new_tokens=16, samples=4),
    )


def rate() -> Config:
    """Sampling of the supervised policy's responses to the training problems."""
    config = reinforce()
    return dataclasses.replace(
        config,
        model=ModelConfig(f"{FOLDER}/sft/policy"),
        sampling=SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=16),
        data=DataConfig(f"{FOLDER}/problems.jsonl"),
    )


def sft() -> Config:
    """Supervised fine-tuning of the random policy until it solves about a third of the training problems."""
    return dataclasses.replace(
        reinforce(),
        run=f"{FOLDER}/sft",
        model=ModelConfig(f"{FOLDER}/start"),
        data=DataConfig(held_out=f"{FOLDER}/problems.jsonl"),  # not in the demonstrations; held_out.jsonl stays unseen
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


def rft() -> Config:
    """Supervised fine-tuning of that policy on its own correct responses (`oreal data rft`)."""
    return dataclasses.replace(
        reinforce(),
        run=f"{FOLDER}/rft",
        model=ModelConfig(f"{FOLDER}/sft/policy"),
        supervised=SupervisedConfig(
            path=f"{FOLDER}/rft.jsonl",
            steps=40,
            samples_per_step=128,
            optimizer=OptimizerConfig(lr=3e-4, min_lr=3e-5, warmup_steps=5),
        ),
    )
