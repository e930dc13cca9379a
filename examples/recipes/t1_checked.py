"""Every part of T1 on the checked task, from nothing on two CPU processes: the recipes of examples/t1.sh.

The supervised policy is that of checked.py: its demonstrations have wrong steps with their checks, as T1's have failed
attempts. `rft` fine-tunes it on its own correct responses, `reinforce` trains it on the problems that it solves seldom.
The functions from `rollouts_16` on are the arms of examples/t1_ablation.sh. OREAL_T1_FOLDER names another folder than
runs/t1/seed_0.
"""

import dataclasses
import os

import checked  # beside this file, like t1
import t1

from oreal_megatron.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PenaltyConfig,
    ReferenceConfig,
    RewardModelConfig,
    SamplingConfig,
    SupervisedConfig,
    VerifyConfig,
)

FOLDER = os.environ.get("OREAL_T1_FOLDER", "runs/t1/seed_0")


def reinforce() -> Config:
    """T1's reinforcement learning: 16 responses at temperature 1.2, penalties, KL in the reward, entropy bonus."""
    return Config(
        run=f"{FOLDER}/reinforce",
        steps=40,
        policy_freeze_steps=0,
        tokens_per_micro_batch=4096,
        model=ModelConfig(f"{FOLDER}/rft/policy"),
        engine=EngineConfig(max_model_len=64, max_num_seqs=512, kv_cache_gib=0.5, enforce_eager=True),
        sampling=SamplingConfig(
            rollouts_per_prompt=16, temperature=1.2, top_p=1.0, min_p=0.02, max_new_tokens=checked.LONGEST
        ),
        data=DataConfig(
            f"{FOLDER}/hard.jsonl", f"{FOLDER}/held_out.jsonl", prompts_per_step=24, buckets=((0.0, 0.31, 1),)
        ),
        verify=VerifyConfig(workers=1),
        selection=t1.SELECTION,
        loss=t1.LOSS,
        reference=ReferenceConfig(decay=0.9),
        optimizer=OptimizerConfig(lr=3e-5, min_lr=1e-5, warmup_steps=10),
        reward_model=RewardModelConfig(enabled=False),
        checkpoint=CheckpointConfig(every=20, keep=2),
        evaluation=EvaluationConfig(every=20, problems=1000, max_new_tokens=checked.LONGEST, samples=4),
    )


def rate() -> Config:
    """Sampling of the supervised policy's responses to the training problems."""
    config = reinforce()
    return dataclasses.replace(
        config,
        sampling=SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=checked.LONGEST),
        model=ModelConfig(f"{FOLDER}/sft/policy"),
        data=DataConfig(f"{FOLDER}/to_rate.jsonl"),
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
            samples_per_step=32,
            optimizer=OptimizerConfig(lr=1e-4, min_lr=1e-5, warmup_steps=5),
        ),
    )


def rollouts_16() -> Config:
    """The first arm of the ablation: every part of T1 from the first supervised policy, evaluated at temperature 1."""
    return dataclasses.replace(
        reinforce(),
        steps=20,
        model=ModelConfig(f"{FOLDER}/sft/policy"),
        checkpoint=CheckpointConfig(every=0),
        evaluation=EvaluationConfig(every=0, problems=1000, max_new_tokens=checked.LONGEST, samples=2, temperature=1.0),
    )


def rollouts_4() -> Config:
    """Fewer responses to each problem."""
    return _sampled(rollouts_per_prompt=4)


def rollouts_64() -> Config:
    """More responses to each problem: the paper's number."""
    return _sampled(rollouts_per_prompt=64)


def temperature_09() -> Config:
    """Sampling at temperature 0.9."""
    return _sampled(temperature=0.9)


def temperature_10() -> Config:
    """Sampling at temperature 1."""
    return _sampled(temperature=1.0)


def temperature_14() -> Config:
    """Sampling at temperature 1.4."""
    return _sampled(temperature=1.4)


def without_penalties() -> Config:
    """No penalties: a response that was cut off is incorrect, as any other."""
    config = rollouts_16()
    return dataclasses.replace(config, selection=dataclasses.replace(config.selection, penalties=PenaltyConfig()))


def without_entropy_bonus() -> Config:
    """No entropy bonus."""
    config = rollouts_16()
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, entropy_coef=0.0))


def fixed_reference() -> Config:
    """A reference that stays the starting policy."""
    return dataclasses.replace(rollouts_16(), reference=ReferenceConfig())


def _sampled(**changes: float) -> Config:
    config = rollouts_16()
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **changes))
