"""SmolLM2-135M-Instruct on two-step word problems: a small pretrained policy on one CPU core or one GPU.

`oreal` and `sft` are the runs of examples/smollm2.sh; `warm_start` and the functions from `without_reward_model` on
belong to examples/smollm2_arms.sh.
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
    RewardTrainingConfig,
    SamplingConfig,
    SupervisedConfig,
    VerifyConfig,
    WeightsConfig,
)

FOLDER = "runs/smollm2"
SYSTEM_PROMPT = r"Solve the problem step by step. Give the final answer in \boxed{}."


def oreal() -> Config:
    """OREAL with the token-level reward model, from the fine-tuned policy."""
    return Config(
        run=f"{FOLDER}/oreal",
        steps=40,
        policy_freeze_steps=3,
        tokens_per_micro_batch=1024,
        # Three models, two optimizers and the engine in 12 GB; half precision makes the engine twice as fast on a CPU.
        model=ModelConfig(f"{FOLDER}/sft/policy", logits_mib=128),
        engine=EngineConfig(
            dtype="bfloat16",
            max_model_len=256,
            max_num_seqs=128,
            kv_cache_gib=0.75,
            buffer_mib=64,
            enforce_eager=True,
        ),
        sampling=SamplingConfig(rollouts_per_prompt=8, temperature=1.0, top_p=1.0, max_new_tokens=64),
        # Without pass rates: no problem is used twice in so few steps, so rating costs as much as training.
        data=DataConfig(
            f"{FOLDER}/problems.jsonl", f"{FOLDER}/held_out.jsonl", prompts_per_step=32, system_prompt=SYSTEM_PROMPT
        ),
        verify=VerifyConfig(workers=1),
        weights=WeightsConfig(
            threshold_correct=0.25, threshold_incorrect=0.25
        ),  # as in addition.py, and for the same reason
        optimizer=OptimizerConfig(lr=3e-5, min_lr=3e-6, warmup_steps=3),
        reward_model=RewardModelConfig(optimizer=OptimizerConfig(lr=5e-5, min_lr=5e-6, warmup_steps=3)),
        checkpoint=CheckpointConfig(every=8, keep=1),
        evaluation=EvaluationConfig(every=8, max_new_tokens=64),
    )


def sft() -> Config:
    """Supervised fine-tuning of the published model on worked problems with boxed answers."""
    return dataclasses.replace(
        oreal(),
        run=f"{FOLDER}/sft",
        model=ModelConfig(f"{FOLDER}/start", logits_mib=128),
        data=DataConfig(
            held_out=f"{FOLDER}/problems.jsonl", system_prompt=SYSTEM_PROMPT
        ),  # the held-out ones stay unseen
        evaluation=EvaluationConfig(problems=100, max_new_tokens=64),
        supervised=SupervisedConfig(
            path=f"{FOLDER}/demonstrations.jsonl",
            steps=40,
            samples_per_step=32,
            evaluate_every=5,
            stop_at_accuracy=0.3,
            optimizer=OptimizerConfig(lr=1e-4, min_lr=1e-5, warmup_steps=3),
        ),
    )


def warm_start() -> Config:
    """Training of the reward model on rated rollouts of the fine-tuned policy, of problems that no arm uses."""
    return dataclasses.replace(
        oreal(),
        run=f"{FOLDER}/reward_model",
        reward_training=RewardTrainingConfig(
            path=f"{FOLDER}/rated/rated.jsonl.answers/problems.rating.jsonl",
            steps=300,
            pairs_per_step=32,
            evaluate_every=20,
            optimizer=OptimizerConfig(lr=5e-5, min_lr=5e-6, warmup_steps=20),
        ),
    )


def without_reward_model() -> Config:
    """OREAL with a weight of 1 for every token."""
    return _arm(RewardModelConfig(enabled=False), WeightsConfig())


def belief_of_token() -> Config:
    """OREAL with a reward model that begins as the policy, and Eq. 10 as printed."""
    return _arm(oreal().reward_model, WeightsConfig(belief="token"))


def warm_belief_of_token() -> Config:
    """OREAL with the warm-started reward model and Eq. 10 as printed."""
    return _arm(_warm(), WeightsConfig(belief="token"))


def warm_prefix_mean() -> Config:
    """OREAL with the warm-started reward model and the released code's prefix mean."""
    return _arm(_warm(), WeightsConfig())


def _warm() -> RewardModelConfig:
    return dataclasses.replace(oreal().reward_model, path=f"{FOLDER}/reward_model/reward_model")


def _arm(reward_model: RewardModelConfig, weights: WeightsConfig) -> Config:
    """Return an arm, evaluated by samples at its end, without checkpoints."""
    return dataclasses.replace(
        oreal(),
        reward_model=reward_model,
        weights=weights,
        checkpoint=CheckpointConfig(every=0),
        evaluation=EvaluationConfig(every=0, max_new_tokens=64, samples=8),
    )
