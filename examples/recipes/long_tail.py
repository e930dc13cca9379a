"""Recipes of the long-tail task: chains of very different lengths, with and without a pool of prompts in flight.

tools/make_long_tail_task.py makes the inputs, tools/chained_digits.py shows the text; examples/long_tail.sh compares
the arms `waiting` and `partial` at equal numbers of trained prompts. There is no reward model: the question is what
generation across steps saves or costs, and a second network in training would add its own spread between seeds.
"""

import dataclasses

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
    RolloutConfig,
    SamplingConfig,
    SupervisedConfig,
    VerifyConfig,
)

FOLDER = "runs/long_tail"
LONGEST = 400  # tokens of a response: 96 steps of four, the stop token, and some to spare


def waiting() -> Config:
    """OREAL whose every step waits for its longest response."""
    return Config(
        run=f"{FOLDER}/waiting",
        steps=60,
        policy_freeze_steps=0,
        tokens_per_micro_batch=4096,
        model=ModelConfig(f"{FOLDER}/sft/policy"),
        engine=EngineConfig(max_model_len=448, max_num_seqs=512, kv_cache_gib=0.5, enforce_eager=True),
        sampling=SamplingConfig(rollouts_per_prompt=8, temperature=1.0, top_p=1.0, max_new_tokens=LONGEST),
        data=DataConfig(f"{FOLDER}/problems.jsonl", f"{FOLDER}/held_out.jsonl", prompts_per_step=16),
        verify=VerifyConfig(workers=1, function="tools/chained_digits.py:is_correct"),
        optimizer=OptimizerConfig(lr=3e-4, min_lr=5e-5, warmup_steps=5),
        reward_model=RewardModelConfig(enabled=False),
        checkpoint=CheckpointConfig(every=0),
        evaluation=EvaluationConfig(every=0, problems=500, max_new_tokens=LONGEST, samples=2),
    )


def partial() -> Config:
    """OREAL over a pool of twice as many prompts, whose unfinished responses continue in the next steps."""
    return dataclasses.replace(
        waiting(),
        run=f"{FOLDER}/partial",
        rollout=RolloutConfig(round_tokens=64, pool=2.0, staleness=3),
        loss=LossConfig(ratio_cap=2.0, ratio_tokens="carried"),
    )


def sft() -> Config:
    """First stage of supervised fine-tuning: the random policy learns the chains from demonstrations without errors."""
    return _supervised("start", "chains", "chains", steps=300, rates=(1e-3, 1e-4))


def sft_care() -> Config:
    """Second stage: the careless demonstrations, so that the policy errs in every tenth step."""
    return _supervised("chains/policy", "sft", "demonstrations", steps=60, rates=(3e-4, 3e-5))


def _supervised(start: str, run: str, data: str, steps: int, rates: tuple[float, float]) -> Config:
    return dataclasses.replace(
        waiting(),
        run=f"{FOLDER}/{run}",
        model=ModelConfig(f"{FOLDER}/{start}"),
        tokens_per_micro_batch=8192,
        supervised=SupervisedConfig(
            path=f"{FOLDER}/{data}.jsonl",
            steps=steps,
            samples_per_step=64,
            optimizer=OptimizerConfig(lr=rates[0], min_lr=rates[1], warmup_steps=min(50, steps // 5)),
        ),
    )
