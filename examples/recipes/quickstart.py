"""The quickstart's recipes: three-digit addition with a 0.8 M-parameter policy, on two CPU processes."""

import dataclasses

from oreal_megatron.config import (
    Checkpoint,
    Config,
    Data,
    Engine,
    Evaluation,
    Model,
    Optimizer,
    Parallel,
    RewardModel,
    Sampling,
    Supervised,
    Verify,
    Weights,
)

FOLDER = "runs/quickstart"


def oreal() -> Config:
    """OREAL with the token-level reward model, from the supervised policy."""
    return Config(
        run=f"{FOLDER}/oreal",
        steps=150,
        policy_freeze_steps=10,
        tokens_per_micro_batch=4096,
        model=Model(f"{FOLDER}/sft/policy"),
        parallel=Parallel(tensor=1, pipeline=1),
        engine=Engine(tensor=1, max_model_len=64, max_num_seqs=512, kv_cache_gb=0.5, enforce_eager=True),
        sampling=Sampling(answers_per_prompt=16, temperature=1.0, top_p=1.0, max_new_tokens=16),
        data=Data(f"{FOLDER}/rated.jsonl", f"{FOLDER}/held_out.jsonl", prompts_per_step=64),
        verify=Verify(workers=1),
        # The reward model of so small a policy hardly beats chance in so few steps. With the paper's threshold of 0.5
        # its doubt would mute every token; with 0.25 a token it knows nothing about weighs a third.
        weights=Weights(threshold=0.25),
        optimizer=Optimizer(lr=3e-4, min_lr=5e-5, warmup_steps=10),
        reward_model=RewardModel(optimizer=Optimizer(lr=1e-3, min_lr=2e-4, warmup_steps=10)),
        checkpoint=Checkpoint(every=50, keep=2),
        evaluation=Evaluation(every=25, max_new_tokens=16),
    )


def oreal_without_reward_model() -> Config:
    """Every token weighs 1 and the policy learns from the first step."""
    return dataclasses.replace(oreal(), run=f"{FOLDER}/without_reward_model", reward_model=RewardModel(enabled=False))


def sft() -> Config:
    """Teach the fresh policy until it is right on about a third of the held-out problems."""
    return dataclasses.replace(
        oreal(),
        run=f"{FOLDER}/sft",
        model=Model(f"{FOLDER}/start"),
        data=Data(held_out=f"{FOLDER}/problems.jsonl"),  # not demonstrated; the held-out problems stay unseen
        evaluation=Evaluation(problems=300, max_new_tokens=16),
        supervised=Supervised(
            path=f"{FOLDER}/demonstrations.jsonl",
            steps=800,
            samples_per_step=128,
            evaluate_every=10,
            stop_at_accuracy=0.3,
            optimizer=Optimizer(lr=2e-3, min_lr=2e-4, warmup_steps=50),
        ),
    )
