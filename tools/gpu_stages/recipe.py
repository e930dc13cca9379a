"""Recipe and verifier of the stage `steps` of tools/gpu_acceptance.py: steps of a real shape with random weights."""

from __future__ import annotations

import os
import zlib

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
    VerifyConfig,
    WeightsConfig,
)

FOLDER = os.environ.get("OREAL_GPU_FOLDER", "runs/gpu")
DRY = "OREAL_GPU_DRY" in os.environ


def steps() -> Config:
    """A few steps from a policy with random weights; about half of the responses count as correct."""
    longest = 32 if DRY else 2048
    return Config(
        run=f"{FOLDER}/run",
        steps=1 if DRY else 4,
        policy_freeze_steps=0,
        offload=True,
        tokens_per_micro_batch=512 if DRY else 16384,
        model=ModelConfig(f"{FOLDER}/policy", dtype="float32" if DRY else "bfloat16"),
        engine=EngineConfig(
            max_model_len=64 + longest, max_num_seqs=256, kv_cache_gib=0.5 if DRY else 30, enforce_eager=DRY
        ),
        sampling=SamplingConfig(
            rollouts_per_prompt=4 if DRY else 8, temperature=1.0, top_p=1.0, max_new_tokens=longest
        ),
        data=DataConfig(f"{FOLDER}/problems.jsonl", prompts_per_step=4 if DRY else 32),
        verify=VerifyConfig(workers=1, function=f"{__file__}:verdict"),
        optimizer=OptimizerConfig(warmup_steps=0),
        reward_model=RewardModelConfig(optimizer=OptimizerConfig(warmup_steps=0)),
        # A fresh reward model believes 0.5 of every token, which the paper's threshold of 0.5 makes a weight of 0.
        weights=WeightsConfig(threshold_correct=0.25, threshold_incorrect=0.25),
        checkpoint=CheckpointConfig(every=0),
        evaluation=EvaluationConfig(every=0),
    )


def verdict(row: dict[str, str], response: str) -> bool:
    """Return whether the response counts as correct: by the parity of its checksum."""
    return zlib.crc32(response.encode()) % 2 == 0
