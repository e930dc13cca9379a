"""Fakes of the pieces of the loop: dataset, engine, verifier, models, weight sync, hooks; they record what happens."""

from __future__ import annotations

import torch

from oreal_megatron.records import Outcome, Prompt, Rollout, TokenWeights, Verdict

ANSWERS = 4


class FakePrompts:
    """Three problems at every step."""

    def take(self, step: int) -> list[Prompt]:
        return [Prompt(i, f"question {i}", str(i), None, (1, 2, i)) for i in range(3)]


class FakeEngine:
    """Responses that are their index; log-probs of -1 for the first one of each prompt."""

    def __init__(self, events: list, logprob: float = -1.0):
        self.events, self.logprob, self.version = events, logprob, 0

    def sleep(self) -> None: ...

    def generate(self, prompts, sampling, seed, finished):
        self.events.append(f"generate {seed}")
        rows = [[self.rollout(p, s, k) for k in range(ANSWERS)] for s, p in enumerate(prompts)]
        for row in rows:
            for rollout in row:
                finished(rollout)
        return rows

    def rollout(self, prompt: Prompt, slot: int, index: int) -> Rollout:
        logprobs = (self.logprob,) * 2 if index == 0 else None
        return Rollout(prompt, slot, index, (5, index), str(index), True, logprobs, self.version)


class FakeVerifier:
    """Responses below the prompt's number are correct: prompt 0 has none, prompts 1 and 2 are mixed."""

    def __init__(self):
        self.submitted = 0

    def submit(self, rollout: Rollout) -> None:
        self.submitted += 1

    def verdicts(self, rollouts):
        def judge(rollout: Rollout) -> Verdict:
            return Verdict(
                Outcome.CORRECT if rollout.index < rollout.slot else Outcome.INCORRECT, "exact", rollout.text
            )

        return [[judge(rollout) for rollout in row] for row in rollouts]


class FakeModel:
    """A model whose log-probs are all -1."""

    def __init__(self, name: str, events: list):
        self.name, self.events, self.updates = name, events, 0

    def score(self, batch):
        return [torch.full((len(part.labels),), -1.0) for part in batch.micro_batches]


class FakePolicy(FakeModel):
    """A policy that counts its updates."""

    non_finite = ""

    def find_non_finite(self, batch):
        return self.non_finite

    def update(self, batch, reference_logp, token_weights):
        assert [len(w) for w in token_weights.values] == [len(r) for r in reference_logp]
        self.updates += 1
        self.events.append(f"policy {batch.counts.sequences} {batch.counts.correct_tokens}")
        return {"loss/total": 1.0}


class FakeRewardModel(FakeModel):
    """A reward model that weighs all tokens alike."""

    def update(self, batch):
        self.events.append("reward model")
        values = [torch.ones(len(part.labels)) for part in batch.micro_batches]
        return TokenWeights(values), {"reward_model/accuracy": 0.5}


class FakeWeightSync:
    """Gives the engine its version number."""

    def __init__(self, engine: FakeEngine, events: list):
        self.engine, self.events = engine, events

    def sync(self, version: int) -> dict[str, float]:
        if self.engine.version != version:
            self.engine.version = version
            self.events.append("weight sync")
        return {"weight_sync/direct": 1.0}


class FakeHooks:
    """Records the end of each step."""

    def __init__(self, events: list):
        self.events = events

    def after_step(self, steps_done: int) -> None:
        self.events.append(f"after {steps_done}")
