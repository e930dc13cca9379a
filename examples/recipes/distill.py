"""Distillation on two-digit addition: a student of two layers, and the teacher of four that it imitates.

`cross_entropy` is for `oreal sft`, as is `teacher`; the others are for `oreal distill`. OREAL_DISTILL_FOLDER names
another folder than runs/distill/seed_0.
"""

import dataclasses
import os

from oreal_megatron.config import (
    Config,
    DataConfig,
    DistillationConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    SupervisedConfig,
)

FOLDER = os.environ.get("OREAL_DISTILL_FOLDER", "runs/distill/seed_0")


def teacher() -> Config:
    """The teacher's own training, on all demonstrations."""
    config = cross_entropy()
    supervised = dataclasses.replace(
        config.supervised, path=f"{FOLDER}/demonstrations.jsonl", steps=500, evaluate_every=50, stop_at_accuracy=0.98
    )
    return dataclasses.replace(
        config, run=f"{FOLDER}/teacher", model=ModelConfig(f"{FOLDER}/start"), supervised=supervised
    )


def cross_entropy() -> Config:
    """The student without a teacher."""
    return Config(
        run=f"{FOLDER}/cross_entropy",
        tokens_per_micro_batch=8192,
        model=ModelConfig(f"{FOLDER}/student"),
        engine=EngineConfig(max_model_len=64, max_num_seqs=512, kv_cache_gib=0.25, enforce_eager=True),
        data=DataConfig(held_out=f"{FOLDER}/held_out.jsonl"),
        evaluation=EvaluationConfig(max_new_tokens=16),
        supervised=SupervisedConfig(
            path=f"{FOLDER}/demonstrations.jsonl",
            steps=200,
            samples_per_step=128,
            evaluate_every=50,
            optimizer=OptimizerConfig(lr=2e-3, min_lr=2e-4, warmup_steps=20),
        ),
    )


def pearson() -> Config:
    """The student with 1 - Pearson correlation of the hidden states."""
    return _arm("pearson")


def mse() -> Config:
    """The student with the mean squared error of the hidden states."""
    return _arm("mse")


def kl_logits() -> Config:
    """The student with the KL divergence of the logits."""
    return _arm("kl_logits")


def _arm(objective: str) -> Config:
    section = DistillationConfig(teacher=f"{FOLDER}/teacher_scaled", objective=objective, layers=2)
    return dataclasses.replace(cross_entropy(), run=f"{FOLDER}/{objective}", distillation=section)
