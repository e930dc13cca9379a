"""`oreal train` in this process, with the real folders, sampler, hooks and loop around models of a few numbers.

The state of a fake model depends on every batch, learning rate and weight decay so far, so that two runs end alike only
if they took the same steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from oreal_megatron.algo.schedule import learning_rate
from oreal_megatron.config import Config
from oreal_megatron.config.user_functions import Origin
from oreal_megatron.mcore import checkpoint_state
from oreal_megatron.observe.run_folder import NO_ORIGIN
from oreal_megatron.records import Outcome, PackingSpec, Rollout, TokenWeights, Verdict
from oreal_megatron.rollout import growth
from oreal_megatron.runtime import checkpoint_folders
from oreal_megatron.runtime.folder_lock import FolderLock
from oreal_megatron.session.models import Models
from oreal_megatron.training import reinforcement

EVENTS = ("save begins", "save is complete", "evaluated", "best is written", "policy is written", "step is done")


class Killed(BaseException):
    """The process ends here, as with SIGKILL: nothing is saved or cleaned up."""


@dataclasses.dataclass
class FakeJob:
    """One start of a run; `kill_at`: (event, number of times it happens before)."""

    config: Config
    kill_at: tuple[str, int] = ("", 0)
    accuracies: dict[int, float] | None = None  # held-out accuracy by updates of the policy; None: from its state
    seen: int = 0

    def happens(self, event: str) -> None:
        if event == self.kill_at[0]:
            self.seen += 1
            if self.seen > self.kill_at[1]:
                raise Killed(event)


class FakeTrainer:
    """A model whose weights are one number."""

    def __init__(self, config: Config, optimizer, frozen: int):
        self.config, self.optimizer, self.frozen = config, optimizer, frozen
        self.updates, self.state = 0, 1.0

    def score(self, batch):
        return [torch.full((len(part.labels),), -1.0) for part in batch.micro_batches]

    def step(self, batch, *shares: float) -> float:
        rate = learning_rate(self.updates, self.config.steps - self.frozen, self.optimizer)
        parts = enumerate(batch.micro_batches)
        content = sum(int((part.labels + 7 * part.carried).sum()) * (number + 1) for number, part in parts)
        self.state = self.state * (1 - rate * self.optimizer.weight_decay) + rate * (content % 997) + sum(shares)
        self.updates += 1
        return rate


class FakePolicy(FakeTrainer):
    def update(self, batch, reference_logp, token_weights):
        rate = self.step(batch, self.config.loss.kl_coef, float(token_weights.values[0][0]))
        return {"policy/learning_rate": rate, "policy/gradient_norm": 1.0, "policy/state": self.state}


class FakeRewardModel(FakeTrainer):
    def update(self, batch):
        weights = [torch.full((len(part.labels),), self.state) for part in batch.micro_batches]
        return TokenWeights(weights), {"reward_model/learning_rate": self.step(batch)}


class FakeEngine:
    """Random responses that depend on the request and on the weights."""

    def __init__(self, job: FakeJob):
        self.job, self.version, self.state, self.replicas = job, 0, 0.0, 1

    def sleep(self) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}

    def is_own(self, rollout: Rollout) -> bool:
        return True

    def generate(self, prompts, sampling, seed, on_rollout=None):
        def rollout(prompt, slot, index):
            chance = random.Random(f"{seed} {slot} {index} {prompt.gold} {self.state} {sampling.temperature}")
            tokens = tuple(chance.randrange(5, 50) for _ in range(3))
            logprobs = (-1.0,) * 3 if index == 0 else None
            return Rollout(prompt, slot, index, tokens, str(tokens[0]), True, logprobs, self.version)

        rows = range(sampling.rollouts_per_prompt)
        return [[rollout(prompt, slot, index) for index in rows] for slot, prompt in enumerate(prompts)]

    def extend(self, rollouts, sampling, seed, on_rollout=None, round_tokens=0):
        """Let responses grow to a length of 1 to 8 tokens that depends on problem and index."""
        self.job.happens("round begins")

        def grow(rollout: Rollout) -> Rollout:
            chance = random.Random(f"{seed} {rollout.key} {len(rollout.tokens)} {rollout.prompt.gold} {self.state}")
            length = random.Random(f"{rollout.prompt.gold} {rollout.index}").choice((1, 1, 2, 2, 3, 5, 7, 8))
            count = min(length - len(rollout.tokens), round_tokens)
            tokens = tuple(chance.randrange(5, 50) for _ in range(count))
            finished = count + len(rollout.tokens) == length < sampling.max_new_tokens
            longer = growth.append(rollout, tokens, (-1.0,) * count, finished, self.version)
            return dataclasses.replace(longer, text=str(longer.tokens[0]) if len(longer.tokens) == length else "")

        return [grow(rollout) for rollout in rollouts]


class FakeVerifier:
    def submit(self, rollout: Rollout) -> None: ...

    def verdicts(self, rollouts):
        def judge(rollout: Rollout) -> Verdict:
            return Verdict(Outcome.CORRECT if rollout.tokens[0] % 2 else Outcome.INCORRECT, "exact", rollout.text)

        return [[judge(rollout) for rollout in row] for row in rollouts]

    def collect(self, rollouts):
        return self.verdicts([rollouts])[0]

    def refuse_too_many_unknown(self, verdicts) -> None: ...


class FakeSession:
    """Session without processes; the lock of the run folder is the real one."""

    def __init__(self, job: FakeJob):
        self.job = job

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.folder_lock.release()

    def lock(self, folder: Path) -> None:
        self.folder_lock = FolderLock(folder)
        self.folder_lock.acquire()

    def start_engine(self, inputs, stop_request=None):
        self.engine = FakeEngine(self.job)
        return self.engine, FakeVerifier()

    def start_megatron(self) -> None: ...


class FakeSync:
    def __init__(self, policy: FakePolicy, engine: FakeEngine):
        self.policy, self.engine = policy, engine

    def sync(self, version: int) -> dict[str, float]:
        self.engine.version, self.engine.state = version, self.policy.state
        return {}


class FakeSaver:
    """Saver that ends a save at the next poll."""

    def __init__(
        self, job: FakeJob, folder: Path, trainers, keep: int, keep_every: int = 0, describe=None, attachments=dict
    ):
        self.job, self.folder, self.trainers, self.keep, self.keep_every = job, folder, trainers, keep, keep_every
        self.attachments = attachments
        self.pending: Path | None = None

    def start(self, step: int, random_state=None) -> None:
        self.finish()
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / (checkpoint_folders.name(step) + checkpoint_folders.PARTIAL)
        checkpoint_folders.begin(partial, self.trainers)
        for name, trainer in self.trainers.items():
            state = {"step": step, "updates": trainer.updates, "state": trainer.state}
            (partial / name / "state.json").write_text(json.dumps(state))
        for name, content in self.attachments().items():
            (partial / name).write_bytes(content)
        self.pending = partial
        self.job.happens("save begins")

    def save(self, step: int, random_state=None) -> None:
        self.start(step)
        self.finish()

    def poll(self) -> None:
        self.finish()

    def finish(self) -> None:
        if self.pending:
            partial, self.pending = self.pending, None
            checkpoint_folders.finish(partial, {})
            checkpoint_folders.prune(self.folder, self.keep, self.keep_every)
            self.job.happens("save is complete")


def load(path: Path, trainers) -> int:
    for name, trainer in trainers.items():
        state = json.loads((path / name / "state.json").read_text())
        trainer.updates, trainer.state = state["updates"], state["state"]
    return state["step"]


def train(
    config: Config,
    resume: str | None = None,
    step: int | None = None,
    kill_at=("", 0),
    accuracies=None,
    stop=False,
    origin: Origin = NO_ORIGIN,
) -> bool:
    """Run `oreal train` as with these arguments; return whether it ended by itself."""
    job = FakeJob(config, kill_at, accuracies)
    with _patched(job), contextlib.suppress(Killed):
        reinforcement.train(config, resume, step, stop, origin)
        return True
    return False


@contextlib.contextmanager
def _patched(job: FakeJob) -> Iterator[None]:
    def build(inputs) -> Models:
        config = inputs.config
        policy = FakePolicy(config, config.optimizer, config.frozen_steps)
        reward_model = FakeRewardModel(config, config.reward_model.optimizer, 0)
        job.policy = policy
        return Models(policy, policy, reward_model, {"policy": policy, "reward_model": reward_model})

    def evaluate(held_out, engine, verifier, config):
        updates = job.policy.updates
        accuracy = job.policy.state % 1 if job.accuracies is None else job.accuracies[updates]
        job.happens("evaluated")
        return {"accuracy": accuracy, "low": 0.0, "high": 1.0, "answers": len(held_out), "unknown": 0}

    def save_model(inputs, name, policy, path, notes):
        path.mkdir(exist_ok=True)
        (path / "weights").write_text(str(policy.state))
        job.happens(f"{path.name} is written")
        for name, text in notes.items():
            (path / name).write_text(text)

    real_log = reinforcement.Recorder.log

    def log(recorder, *values):
        real_log(recorder, *values)
        job.happens("step is done")

    with contextlib.ExitStack() as patches:
        replace: Callable = lambda target, name, value: patches.enter_context(mock.patch.object(target, name, value))  # noqa: E731
        replace(reinforcement, "Session", lambda config: FakeSession(job))
        replace(reinforcement, "build_models", build)
        replace(reinforcement, "CheckpointSaver", lambda *values, **names: FakeSaver(job, *values, **names))
        replace(reinforcement.policy_weights, "connect", FakeSync)
        replace(reinforcement.policy_weights, "save_model", save_model)
        replace(reinforcement.score, "evaluate", evaluate)
        replace(reinforcement.parallel, "replica_share", lambda: (0, 1))
        replace(reinforcement.parallel, "packing_spec", lambda *_: PackingSpec(1000))
        replace(reinforcement.speed_report, "write_and_print", lambda record: None)
        replace(reinforcement.Recorder, "log", log)
        replace(checkpoint_state, "check", lambda path: None)
        replace(checkpoint_state, "load", load)
        replace(checkpoint_state, "random_state", dict)
        yield
