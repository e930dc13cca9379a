"""Measure generation with and without a pool of prompts in flight, with real vLLM and prescribed response lengths.

    torchrun --nproc-per-node 2 tools/measure_long_tail.py [--pool 2] [--round-tokens 32]

A small model with random weights answers with lengths drawn from a log-normal distribution (median 10 tokens, one in a
hundred above 300, cap 480), because it never stops by itself. Both kinds take their steps in turn, so that other work
on the machine hits both. Nothing is trained: weights stay the same, and times are those of generation only.

The seconds of both are printed beside those of the simulation of `oreal plan --rollouts`: the same lengths in the same
order and steps, and the cost of an engine step as this run measured it, by least squares: a constant, a share of each
response, and one of each that starts in the step, which every round makes all of them do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from small_model import make_model

from oreal_megatron import config as c
from oreal_megatron.mcore import parallel
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.plan import rollout_simulation
from oreal_megatron.plan.decode_replica import DecodeCost
from oreal_megatron.plan.gpus import GPUS
from oreal_megatron.plan.rollout_simulation import STEPS, WARM_UP
from oreal_megatron.plan.scenario import Scenario
from oreal_megatron.records import Outcome, Prompt, Rollout, Verdict
from oreal_megatron.runtime import distributed, heartbeat
from oreal_megatron.session.inputs import read_inputs
from oreal_megatron.session.session import start_engine

PROMPTS, ROLLOUTS, CAP = 16, 8, 480
MEDIAN, SIGMA = 10.0, 1.5  # of the log-normal lengths
PROMPT_SHARE = 0.5  # of the variance of log lengths, common to the rollouts of a prompt


def length_of(prompt: int, index: int) -> int:
    """Return the length of a response, the same in every kind of generation."""
    common, own = (random.Random(text).gauss(0, 1) for text in (f"{prompt}", f"{prompt} {index}"))
    drawn = SIGMA * (PROMPT_SHARE**0.5 * common + (1 - PROMPT_SHARE) ** 0.5 * own)
    return max(1, min(round(MEDIAN * 2.718281828**drawn), CAP))


class NumberedProblems:
    """Problems whose id is their position in the order of the run."""

    def take(self, step: int) -> list[Prompt]:
        """Return the problems of a step."""
        first = step * PROMPTS
        return [Prompt(i, "", "", None, (4 + i % 60, 5, 6, 7)) for i in range(first, first + PROMPTS)]


class NoGrading:
    """Verifier that calls everything correct."""

    def submit(self, rollout: Rollout) -> None:
        """Do nothing."""

    def collect(self, rollouts: list[Rollout]) -> list[Verdict]:
        """Return verdicts."""
        return [Verdict(Outcome.CORRECT, "exact") for _ in rollouts]

    def verdicts(self, rollouts: list[list[Rollout]]) -> list[list[Verdict]]:
        """Return verdicts."""
        return [self.collect(row) for row in rollouts]

    def refuse_too_many_unknown(self, verdicts: list[Verdict]) -> None:
        """Refuse nothing."""


def prescribe_lengths(engine: Any) -> None:
    """Let responses end at their drawn length, in the engine and in the pool."""
    from oreal_megatron.rollout import pool_schedule

    original = engine._sampling_params

    def sampling_params(sampling: c.SamplingConfig, seed: Any, rollout: Rollout, round_tokens: int) -> Any:
        parameters = original(sampling, seed, rollout, round_tokens)
        left = length_of(rollout.prompt.id, rollout.index) - len(rollout.tokens)
        parameters.max_tokens = parameters.min_tokens = min(parameters.max_tokens, left)
        return parameters

    engine._sampling_params, engine.stop_tokens = sampling_params, []
    pool_schedule.is_open = lambda rollout, config: len(rollout.tokens) < length_of(rollout.prompt.id, rollout.index)


class StepTimer:
    """Seconds of the engine's steps by the numbers of responses that grow and that start in them."""

    def __init__(self, engine: Any) -> None:
        self.rows: list[tuple[int, int, int]] = []  # 1, responses that grow, responses that start
        self.seconds: list[float] = []
        self.engine, self.step, self.before = engine, engine.step, 0
        engine.step = self.timed_step

    def timed_step(self) -> Any:
        """Take a step and note it. Requests are added only between the steps of different calls, all at once."""
        growing, started_at = self.engine.get_num_unfinished_requests(), time.monotonic()
        outputs = self.step()
        self.seconds.append(time.monotonic() - started_at)
        self.rows.append((1, growing, max(growing - self.before, 0)))
        self.before = self.engine.get_num_unfinished_requests()
        return outputs

    def cost(self, slots: int) -> DecodeCost:
        """Return the cost of a step as a constant, a share of each response, and one of each that starts.

        None is below 0; the prefill is in the cost of a start.
        """
        rows, seconds = np.array(self.rows, float), np.array(self.seconds)
        costs, columns = np.full(3, -1.0), [0, 1, 2]
        while costs.min() < 0:  # without the columns that had a negative cost, the others are fitted again
            costs = np.zeros(3)
            costs[columns] = np.linalg.lstsq(rows[:, columns], seconds, rcond=None)[0]
            columns = [column for column in columns if costs[column] > 0]
        constant, share, start = map(float, costs)
        return DecodeCost(0.0, 0.0, share, constant, 0.0, slots, float("inf"), start)


class RunLengths:
    """The lengths that this run prescribes, in its order; the generator is not used."""

    def draw(self, random: np.random.Generator, prompts: int, rollouts: int) -> Any:
        """Return lengths [prompts, rollouts]."""
        return np.array([[length_of(prompt, index) for index in range(rollouts)] for prompt in range(prompts)])

    def describe(self) -> str:
        """Return the source as text."""
        return "the lengths of this run"


def simulated_seconds(config: c.Config, arch: Architecture, cost: DecodeCost) -> dict[str, float]:
    """Return simulated seconds of generation of a step, waiting for the longest response and with the pool."""
    scenario = Scenario(config, arch, next(iter(GPUS.values())), distributed.world_size())
    scenario = dataclasses.replace(scenario, assumed=dataclasses.replace(scenario.assumed, prompt_tokens=4))
    pool = rollout_simulation.policy_of(config.rollout)
    assert pool is not None
    return {
        kind: rollout_simulation.simulate(scenario, 0.0, policy, RunLengths(), 0, cost).generation_s
        for kind, policy in (("waiting", rollout_simulation.ROLLOUTS), ("pool", pool))
    }


def measure(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return seconds per step of both kinds, and lengths of what they return."""
    config = c.Config(
        model=c.ModelConfig(folder),
        engine=c.EngineConfig(max_model_len=512, max_num_seqs=256, kv_cache_gib=0.5, enforce_eager=True),
        sampling=c.SamplingConfig(rollouts_per_prompt=ROLLOUTS, top_p=1.0, max_new_tokens=CAP),
        data=c.DataConfig(prompts_per_step=PROMPTS),
        loss=c.LossConfig(ratio_cap=2.0, ratio_tokens="carried"),
        rollout=c.RolloutConfig(arguments.round_tokens, arguments.pool, staleness=arguments.staleness),
    )
    parallel.start_process_group()
    inputs = read_inputs(config)
    engine, _ = start_engine(inputs)
    from oreal_megatron.rollout.rollout_pool import RolloutPool

    prescribe_lengths(engine)
    timer = StepTimer(engine.llm.llm_engine)
    problems = NumberedProblems()
    pool = RolloutPool(config, problems, engine, NoGrading())
    seconds: dict[str, list[float]] = {"waiting": [], "pool": []}
    lengths: dict[str, list[int]] = {"waiting": [], "pool": []}
    idle = []
    for step in range(WARM_UP + STEPS):
        for kind, source in (("waiting", engine), ("pool", pool)):
            prompts = problems.take(step) if kind == "waiting" else pool.take(step)
            distributed.all_gather_object(0)
            heartbeat.beat()
            started_at = time.monotonic()
            rows = source.generate(prompts, config.sampling, (0, step))
            elapsed = time.monotonic() - started_at
            if kind == "pool":
                pool.verdicts(rows)
            if step >= WARM_UP:
                assert len(rows) >= PROMPTS
                seconds[kind].append(elapsed / len(rows) * PROMPTS)
                lengths[kind] += [len(rollout.tokens) for row in rows for rollout in row]
                idle += [pool.metrics()["speed/idle/generate"]] if kind == "pool" else []
    costs = distributed.all_gather_object(timer.cost(config.engine.max_num_seqs))
    parallel.stop(engine)
    cost = dataclasses.replace(
        costs[0],
        row_s=statistics.mean(cost.row_s for cost in costs),
        overhead_s=statistics.mean(cost.overhead_s for cost in costs),
        start_s=statistics.mean(cost.start_s for cost in costs),
    )
    simulated = simulated_seconds(config, inputs.arch, cost)
    return {
        "seconds per step": {kind: [round(value, 3) for value in values] for kind, values in seconds.items()},
        "sum": {kind: round(sum(values), 2) for kind, values in seconds.items()},
        "ratio": round(sum(seconds["pool"]) / sum(seconds["waiting"]), 3),
        "simulated sum": {kind: round(value * STEPS, 2) for kind, value in simulated.items()},
        "simulated ratio": round(simulated["pool"] / simulated["waiting"], 3),
        "milliseconds of a step": f"{1000 * cost.overhead_s:.2f} + {1000 * cost.row_s:.3f} x responses + "
        f"{1000 * cost.start_s:.3f} x starts",
        "mean length": {kind: round(statistics.mean(values), 2) for kind, values in lengths.items()},
        "idle share of the pool": round(statistics.mean(idle), 3),
        "settings": dataclasses.asdict(config.rollout),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pool", type=float, default=2.0)
    parser.add_argument("--round-tokens", type=int, default=32)
    parser.add_argument("--staleness", type=int, default=2)
    arguments = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / "oreal_long_tail_model"
    if distributed.rank() == 0 and not folder.exists():
        make_model(folder, seed=1)
    while not (folder / "model.safetensors").exists():
        time.sleep(0.1)
    result = measure(arguments, str(folder))
    if distributed.rank() == 0:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
