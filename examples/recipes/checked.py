"""Recipes of the checked task: running sums modulo 10 with a written check after each step, on CPU processes.

tools/make_checked_task.py makes the inputs, tools/checked_steps.py shows the text. `quickstart` is the run of
examples/quickstart.sh; the other functions below `oreal` are the arms that tools/compare_arms.py compares.
OREAL_CHECKED_FOLDER names another folder than runs/checked.
"""

import dataclasses
import os

from oreal_megatron.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RewardModelConfig,
    SamplingConfig,
    SelectionConfig,
    SupervisedConfig,
    VerifyConfig,
    WeightsConfig,
)

FOLDER = os.environ.get("OREAL_CHECKED_FOLDER", "runs/checked")
LONGEST = 28  # tokens of a response: eight steps of two, a box of nine, the stop token, and two to spare


def oreal() -> Config:
    """OREAL with the token-level reward model and the prefix mean of its scores, from the supervised policy."""
    return Config(
        run=f"{FOLDER}/oreal",
        steps=80,
        policy_freeze_steps=10,
        tokens_per_micro_batch=4096,
        model=ModelConfig(f"{FOLDER}/sft/policy"),
        engine=EngineConfig(max_model_len=64, max_num_seqs=512, kv_cache_gib=0.5, enforce_eager=True),
        sampling=SamplingConfig(rollouts_per_prompt=8, temperature=1.0, top_p=1.0, max_new_tokens=LONGEST),
        data=DataConfig(f"{FOLDER}/problems.jsonl", f"{FOLDER}/held_out.jsonl", prompts_per_step=24),
        verify=VerifyConfig(workers=1),
        optimizer=OptimizerConfig(lr=1e-4, min_lr=2e-5, warmup_steps=10),
        reward_model=RewardModelConfig(optimizer=OptimizerConfig(lr=1e-4, min_lr=2e-5, warmup_steps=10)),
        checkpoint=CheckpointConfig(every=0),
        evaluation=EvaluationConfig(every=0, problems=1000, max_new_tokens=LONGEST, samples=2),
    )


def without_reward_model() -> Config:
    """OREAL with a weight of 1 for every token; the policy is trained from the first step."""
    config = oreal()
    return dataclasses.replace(config, reward_model=dataclasses.replace(config.reward_model, enabled=False))


def belief_of_token() -> Config:
    """OREAL with token weights from the score of the token itself, Eq. 10 as printed."""
    return dataclasses.replace(oreal(), weights=WeightsConfig(belief="token"))


def quickstart() -> Config:
    """OREAL with Eq. 10 as printed, with checkpoints and evaluations on the way: the run of examples/quickstart.sh."""
    config = belief_of_token()
    return dataclasses.replace(
        config,
        run=f"{FOLDER}/quickstart",
        checkpoint=CheckpointConfig(every=40),
        evaluation=dataclasses.replace(config.evaluation, every=20),
    )


def prefix_objective() -> Config:
    """OREAL with a reward model trained by cross entropy at every prefix (arXiv 2604.13197), weights as in Eq. 10."""
    config = belief_of_token()
    return dataclasses.replace(config, reward_model=dataclasses.replace(config.reward_model, objective="prefix"))


def shuffled_weights() -> Config:
    """OREAL with the reward model's weights dealt at random to the tokens of each side."""
    return dataclasses.replace(oreal(), weights=WeightsConfig(shuffle=True))


def true_errors() -> Config:
    """OREAL with weights from the true first error of each incorrect response, without a reward model."""
    return dataclasses.replace(
        without_reward_model(), weights=WeightsConfig(rule="tools/checked_weights.py:first_error")
    )


def reinforce() -> Config:
    """REINFORCE on all rollouts: the reward without a baseline, one denominator for both sides (Table 2, first row)."""
    return dataclasses.replace(
        without_reward_model(),
        selection=SelectionConfig(advantage="reward", keep="all"),
        loss=LossConfig(negative_coef=1.0, normalise="joint"),
    )


def reward_shaping() -> Config:
    """REINFORCE with leave-one-out advantages, which weigh rare outcomes more (Table 2, second row)."""
    return dataclasses.replace(reinforce(), selection=SelectionConfig(keep="all"), loss=LossConfig(negative_coef=1.0))


def behaviour_cloning() -> Config:
    """Cloning of one correct rollout of each prompt, and a penalty for an incorrect one (Table 2, third row)."""
    return dataclasses.replace(without_reward_model(), loss=LossConfig(advantage_on_positives=False))


def token_reward_model() -> Config:
    """Behaviour cloning with the token-level reward model (Table 2, fourth row)."""
    return dataclasses.replace(oreal(), loss=LossConfig(advantage_on_positives=False))


def sft() -> Config:
    """First stage of supervised fine-tuning: the random policy learns the sums from demonstrations without errors."""
    return _supervised("start", "sums", "sums", steps=500, rates=(1e-3, 1e-4))


def sft_checks() -> Config:
    """Second stage: checks, from demonstrations in which every second step is wrong."""
    return _supervised("sums/policy", "checks", "checks", steps=700, rates=(1e-3, 1e-4))


def sft_care() -> Config:
    """Third stage: the careless demonstrations, so that the policy errs in every seventh step."""
    return _supervised("checks/policy", "sft", "demonstrations", steps=150, rates=(3e-4, 3e-5))


def _supervised(start: str, run: str, data: str, steps: int, rates: tuple[float, float]) -> Config:
    return dataclasses.replace(
        oreal(),
        run=f"{FOLDER}/{run}",
        model=ModelConfig(f"{FOLDER}/{start}"),
        tokens_per_micro_batch=8192,
        supervised=SupervisedConfig(
            path=f"{FOLDER}/{data}.jsonl",
            steps=steps,
            samples_per_step=32,
            optimizer=OptimizerConfig(lr=rates[0], min_lr=rates[1], warmup_steps=50),
        ),
    )
