"""Interfaces between packages: what `loop.py` needs of a dataset, an engine, a verifier and the models.

`loop.py` and the tests know these protocols only; `session/` builds the objects that implement them. Every method is
collective (all ranks call it together) unless its docstring says otherwise. P, K: see records.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from oreal_megatron.config import SamplingConfig
from oreal_megatron.records import Batch, Prompt, Rollout, TokenWeights, Verdict

Metrics = dict[str, float]
# One tensor [T] per micro-batch, on the ranks of the last pipeline stage.
TokenValues = list[Tensor]


class Dataset(Protocol):
    """Problems in the order in which the run visits them."""

    def take(self, step: int) -> list[Prompt]:
        """Return the P prompts of a step, counted from 0. A pure function of the step; not collective."""
        ...


class RolloutEngine(Protocol):
    """A generator of rollouts that holds one version of the policy's weights."""

    @property
    def version(self) -> int:
        """Updates of the policy whose weights the engine holds."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seed: tuple[int, int],
        on_rollout: Callable[[Rollout], None] | None = None,
    ) -> list[list[Rollout]]:
        """Return [P, K] rollouts on every rank; `on_rollout` receives each one on the rank that generated it.

        Values of a rollout are on the ranks of the replica that generated it (runtime/remote_values.py).
        """
        ...

    def sleep(self) -> None:
        """Release weights and KV cache until the next weight sync, where the platform can."""
        ...


class GrowingEngine(RolloutEngine, Protocol):
    """A generator whose rollouts can grow in rounds."""

    replicas: int

    def extend(
        self,
        rollouts: Sequence[Rollout],
        sampling: SamplingConfig,
        seed: tuple[int, int],
        on_rollout: Callable[[Rollout], None] | None = None,
        round_tokens: int = 0,
    ) -> list[Rollout]:
        """Return rollouts, on every rank, after they have grown by at most `round_tokens`; `on_rollout`: complete."""
        ...

    def is_own(self, rollout: Rollout) -> bool:
        """Return whether this rank's replica generates a rollout. Not collective."""
        ...


class WeightReceiver(Protocol):
    """The side of an engine that receives weights."""

    version: int

    @property
    def awake(self) -> bool:
        """True while weights and KV cache are allocated."""
        ...

    def wake(self) -> None:
        """Allocate memory for weights; their contents are undefined."""
        ...

    def live(self) -> tuple[dict[str, Tensor], str]:
        """Return this rank's parameters by vLLM's names, and why they cannot be written directly ("" if they can)."""
        ...

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load full tensors under Hugging Face names through the engine's own loader."""
        ...

    def accept(self, version: int) -> None:
        """Mark the weights as those of a policy version: drop cached keys and values, allocate the KV cache."""
        ...


class Verifier(Protocol):
    """A grader of rollouts."""

    def submit(self, rollout: Rollout) -> None:
        """Start grading one rollout of this rank. Not collective."""
        ...

    def verdicts(self, rollouts: Sequence[Sequence[Rollout]]) -> list[list[Verdict]]:
        """Return [P, K] verdicts on every rank, once all submitted rollouts are graded."""
        ...


class RoundVerifier(Verifier, Protocol):
    """A grader that is asked in several rounds of a step."""

    def collect(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Return the verdicts of submitted rollouts on every rank, once all submitted ones are graded."""
        ...

    def refuse_too_many_unknown(self, verdicts: Sequence[Verdict]) -> None:
        """Raise RunStopped where too large a share of a step's verdicts is unknown. Not collective."""
        ...


class Scorer(Protocol):
    """A model that assigns one value to every action token."""

    def score(self, batch: Batch) -> TokenValues | None:
        """Return one value per action token for each micro-batch; None before the last pipeline stage."""
        ...


class PolicyTrainer(Scorer, Protocol):
    """The policy; its scores are log-probs."""

    updates: int  # optimizer steps taken so far: the version of its weights

    def update(self, batch: Batch, reference_logp: TokenValues | None, token_weights: TokenWeights) -> Metrics:
        """Take one OREAL step (arXiv 2502.06781, Eq. 11); skip it where the token weights are not valid."""
        ...

    def find_non_finite(self, batch: Batch) -> str:
        """Describe the first value of this rank's model that is not finite; "" if there is none."""
        ...


class RewardModelTrainer(Protocol):
    """The token-level reward model."""

    def update(self, batch: Batch) -> tuple[TokenWeights, Metrics]:
        """Take one step; return the token weights from before it, and metrics."""
        ...


class WeightSync(Protocol):
    """The transport of the policy's weights to the engine."""

    def sync(self, version: int) -> Metrics:
        """Make the engine hold the weights of a policy version, and verify it; do nothing if it holds them already."""
        ...


class RunRecorder(Protocol):
    """The record of a run: progress, phase times, metrics, rollouts and dumps."""

    def steps(self) -> AbstractContextManager[Iterator[int]]:
        """Iterate over the steps that remain, under a progress bar. Not collective."""
        ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a phase of the step on this rank. Not collective."""
        ...

    def dump(
        self,
        step: int,
        batch: Batch,
        reference_logp: TokenValues | None,
        token_weights: TokenWeights,
        metrics: Metrics,
    ) -> None:
        """Write what the step is trained on, for `oreal replay`. Not collective."""
        ...

    def log(
        self,
        step: int,
        metrics: Metrics,
        rollouts: Sequence[Sequence[Rollout]],
        verdicts: Sequence[Sequence[Verdict]],
    ) -> None:
        """Write metrics, timings and rollouts of a finished step."""
        ...


class StepHooks(Protocol):
    """Work between two steps: save, evaluate, stop when the scheduler asks for it."""

    def after_step(self, steps_done: int) -> None:
        """Run what is due after `steps_done` steps."""
        ...
