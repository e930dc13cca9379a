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


def train(model: str, folder: str, name: str, stop_after: int, resume: bool) -> object:
    """Train in `folder`/`name`, until it is done or a signal stops it; return the result or the message."""
    from oreal_megatron.training import reward_model

    config = dataclasses.replace(configuration(model, folder), run=f"{folder}/{name}")
    try:
        return reward_model.train_reward_model(config, config.run if resume else None, None, StopAfter(stop_after))
    except c.Preempted as stopped:
        from oreal_megatron.mcore import parallel

        parallel.stop()
        return str(stopped)


def held_out_figures(model: str, folder: str) -> tuple[dict, list[str]]:
    """Evaluate the weights of reward_model.path at another layout; return figures, and names of the run's inputs."""
    from oreal_megatron.algo import packing
    from oreal_megatron.data import labelled_rollouts
    from oreal_megatron.mcore import parallel
    from oreal_megatron.session.inputs import read_inputs
    from oreal_megatron.session.models import build_reward_model
    from oreal_megatron.training import reward_model

    started = c.RewardModelConfig(path=f"{folder}/run/reward_model")
    layout = c.ParallelConfig(pipeline=2)
    config = dataclasses.replace(configuration(model, folder), reward_model=started, parallel=layout)
    inputs = read_inputs(config)
    parallel.start_process_group()
    parallel.start_megatron(config.parallel, seed=0)
    render = reward_model.prompt_renderer(inputs)
    rollouts = labelled_rollouts.load(config.reward_training.path, inputs.tokenizer, render, 64)
    _, held_out = labelled_rollouts.split(rollouts.prompts, 0.2, config.seed)
    samples = [sample for prompt in held_out for sample in (*prompt.correct, *prompt.incorrect)]
    batch = packing.batch(samples, parallel.packing_spec(100))
    figures = reward_model.held_out_figures(build_reward_model(inputs), batch)
    parallel.stop()
    return figures, list(inputs.fingerprints())


def rows(run: Path, name: str) -> list[dict]:
    """Lines of a run, without what a clock wrote."""
    read = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k and not k.startswith("speed/")} for row in read]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.full)])
def test_it_learns_resumes_bit_by_bit_and_starts_reinforcement_learning(
    processes, model_folder, in_processes, tmp_path
):
    write_rollouts(tmp_path / "rollouts.jsonl")
    places = str(model_folder), str(tmp_path)
    results = in_processes(processes, train, *places, "run", STEPS, False)
    result = results[0]
    assert results == [result] * processes and result.start == 0.5 and result.best > 0.85, result
    messages = in_processes(processes, train, *places, "stopped", 5, False)
    assert all(f"Continue with: oreal reward-model --resume {tmp_path}/stopped" in message for message in messages)
    assert in_processes(processes, train, *places, "stopped", STEPS, True) == results
    for figures, names in in_processes(2, held_out_figures, *places):
        assert figures["auc"] == pytest.approx(result.best, abs=1e-3) and figures["rollouts"] == 64
        assert "reward_model.path" in names
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    for name in ("metrics.jsonl", "evaluations.jsonl", "calibration.jsonl"):
        assert rows(run, name) == rows(stopped, name)
    assert [row["step"] for row in rows(run, "evaluations.jsonl")] == [0, 4, 8, 12]
    weights = "reward_model/model.safetensors"
    assert (run / weights).read_bytes() == (stopped / weights).read_bytes()
