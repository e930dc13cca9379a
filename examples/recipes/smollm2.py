"""SmolLM2-135M-Instruct on two-step word problems: a small pretrained policy, on one process: a CPU core or a GPU."""

import dataclasses

from oreal_megatron.config import (
    Checkpoint,
    Config,
    Data,
    Engine,
    Evaluation,
    Model,
    Optimizer,
    RewardModel,
    Sampling,
    Supervised,
    Verify,
    Weights,
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
        model=Model(f"{FOLDER}/sft/policy", logits_megabytes=128),
        engine=Engine(
            dtype="bfloat16",
            max_model_len=256,
            max_num_seqs=128,
            kv_cache_gb=0.75,
            buffer_megabytes=64,
            enforce_eager=True,
        ),
        sampling=Sampling(answers_per_prompt=8, temperature=1.0, top_p=1.0, max_new_tokens=64),
        # Not rated: no problem comes twice in so few steps, so to rate them would cost as much as to train on them.
        data=Data(
            f"{FOLDER}/problems.jsonl", f"{FOLDER}/held_out.jsonl", prompts_per_step=32, system_prompt=SYSTEM_PROMPT
        ),
        verify=Verify(workers=1),
        weights=Weights(threshold=0.25),  # as in the quickstart: so few steps leave the reward model in doubt
        optimizer=Optimizer(lr=3e-5, min_lr=3e-6, warmup_steps=3),
        reward_model=RewardModel(optimizer=Optimizer(lr=5e-5, min_lr=5e-6, warmup_steps=3)),
        checkpoint=Checkpoint(every=8, keep=1),
        evaluation=Evaluation(every=8, max_new_tokens=64),
    )


def sft() -> Config:
    """Teach the published model to put its answer in a box, on a few worked problems."""
    return dataclasses.replace(
        oreal(),
        run=f"{FOLDER}/sft",
        model=Model(f"{FOLDER}/start", logits_megabytes=128),
        data=Data(held_out=f"{FOLDER}/problems.jsonl", system_prompt=SYSTEM_PROMPT),  # the held-out ones stay unseen
        evaluation=Evaluation(problems=100, max_new_tokens=64),
        supervised=Supervised(
            path=f"{FOLDER}/demonstrations.jsonl",
            steps=40,
            samples_per_step=32,
            evaluate_every=5,
            stop_at_accuracy=0.3,
            optimizer=Optimizer(lr=1e-4, min_lr=1e-5, warmup_steps=3),
        ),
    )
