"""`oreal reward-model` through real Megatron: it learns, resumes, and `oreal train` starts from its weights."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from oreal_megatron import config as c

STEPS = 12


def write_rollouts(file: Path, prompts: int = 40, responses: int = 8, learnable: bool = True) -> None:
    """Sums whose responses are digits; those with a 7 are correct (or, not learnable: those of a coin)."""
    generator = random.Random(3)
    rows = []
    for prompt in range(prompts):
        for index in range(responses):
            digits = [generator.choice("012345689") for _ in range(generator.randint(2, 6))]
            correct = generator.random() < 0.3
            if correct and learnable:
                digits[generator.randrange(len(digits))] = "7"
            rows.append(
                {
                    "problem": prompt, "question": f"{prompt}+{prompt}", "index": index, "response": "".join(digits),
                    "tokens": len(digits) + 1, "finished": True, "verdict": "correct" if correct else "incorrect",
                }
            )  # fmt: skip
    rows.append(rows[0] | {"verdict": "unknown"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def configuration(model: str, folder: str, **training) -> c.Config:
    """The configuration of a run in `folder`, with a model of four layers."""
    optimizer = c.OptimizerConfig(lr=3e-3, min_lr=1e-3, warmup_steps=2)
    settings = dict(steps=STEPS, pairs_per_step=16, held_out_share=0.2, evaluate_every=4, optimizer=optimizer)
    return c.Config(
        run=f"{folder}/run",
        model=c.ModelConfig(model),
        engine=c.EngineConfig(max_model_len=32, kv_cache_gib=0.05),
        tokens_per_micro_batch=256,
        reward_training=c.RewardTrainingConfig(path=f"{folder}/rollouts.jsonl", **settings | training),
        checkpoint=c.CheckpointConfig(every=4, keep=2),
    )


class StopAfter:
    """A stop request that arrives after so many steps."""

    def __init__(self, steps: int):
        self.steps = steps

    def __bool__(self) -> bool:
        self.steps -= 1
        return self.steps < 0


def train_and_resume(model: str, folder: str) -> list:
    """Train without interruption, and with one; evaluate the saved weights from reward_model.path at another layout."""
    from oreal_megatron.algo import packing
    from oreal_megatron.data import labelled_rollouts
    from oreal_megatron.mcore import parallel
    from oreal_megatron.session.inputs import read_inputs
    from oreal_megatron.session.models import build_reward_model
    from oreal_megatron.training import reward_model

    config = configuration(model, folder)
    result = reward_model.train_reward_model(config, None, None, StopAfter(STEPS))
    stopped = dataclasses.replace(config, run=f"{folder}/stopped")
    with pytest.raises(c.Preempted, match="Continue with: oreal reward-model --resume"):
        reward_model.train_reward_model(stopped, None, None, StopAfter(5))
    again = reward_model.train_reward_model(stopped, stopped.run, None, StopAfter(STEPS))

    started = c.RewardModelConfig(path=f"{config.run}/reward_model")
    config = dataclasses.replace(config, reward_model=started, parallel=c.ParallelConfig(pipeline=2))
    inputs = read_inputs(config)
    parallel.start_process_group()
    parallel.start_megatron(config.parallel, seed=0)
    rollouts = labelled_rollouts.load(
        config.reward_training.path, inputs.tokenizer, reward_model.prompt_renderer(inputs), 64
    )
    _, held_out = labelled_rollouts.split(rollouts.prompts, 0.2, config.seed)
    samples = [sample for prompt in held_out for sample in (*prompt.correct, *prompt.incorrect)]
    batch = packing.batch(samples, parallel.packing_spec(100))
    figures = reward_model.held_out_figures(build_reward_model(inputs), batch)
    parallel.stop()
    return [result, again, figures, list(inputs.fingerprints())]


def rows(run: Path, name: str) -> list[dict]:
    """Lines of a run, without what a clock wrote."""
    read = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k and not k.startswith("speed/")} for row in read]


def test_it_learns_resumes_bit_by_bit_and_starts_reinforcement_learning(model_folder, in_processes, tmp_path):
    write_rollouts(tmp_path / "rollouts.jsonl")
    for result, again, figures, names in in_processes(2, train_and_resume, str(model_folder), str(tmp_path)):
        assert result == again and result.start < 0.75 and result.best > 0.85, result
        assert figures["auc"] == pytest.approx(result.best, abs=1e-3) and figures["rollouts"] == 64
        assert names[1] == f"reward model {tmp_path}/run/reward_model"
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert rows(run, name) == rows(stopped, name)
    assert [row["step"] for row in rows(run, "evaluations.jsonl")] == [0, 4, 8, 12]
    weights = "reward_model/model.safetensors"
    assert (run / weights).read_bytes() == (stopped / weights).read_bytes()
