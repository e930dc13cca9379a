"""Lengths of responses for the rollout simulation: a log-normal distribution with a cap, or those of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from oreal_megatron.config import ConfigError
from oreal_megatron.runtime import rollout_files

Lengths = NDArray[np.int64]


class LengthSource(Protocol):
    """A distribution of response lengths in tokens; rollouts of one prompt resemble each other."""

    def draw(self, random: np.random.Generator, prompts: int, rollouts: int) -> Lengths:
        """Return lengths [prompts, rollouts], at least 1."""
        ...

    def describe(self) -> str:
        """Return the distribution as text."""
        ...


@dataclass(frozen=True)
class LogNormalLengths:
    """min(cap, median * exp(sigma * (sqrt(s) * z_prompt + sqrt(1 - s) * z_rollout))), z standard normal."""

    median: float
    sigma: float
    prompt_share: float  # s: share of the variance that rollouts of one prompt have in common
    cap: int

    @classmethod
    def with_mean(cls, mean: float, sigma: float, prompt_share: float, cap: int) -> LogNormalLengths:
        """Return the distribution whose capped mean is `mean`, by bisection; ConfigError if no median gives it."""
        if not 0 < mean < cap:
            raise ConfigError(f"a mean response of {mean:g} tokens is impossible with at most {cap} tokens")
        low, high = 1e-3, 1e9
        for _ in range(100):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if _capped_mean(middle, sigma, cap) < mean else (low, middle)
        return cls(low, sigma, prompt_share, cap)

    def draw(self, random: np.random.Generator, prompts: int, rollouts: int) -> Lengths:
        """Return lengths [prompts, rollouts]."""
        shared = random.standard_normal((prompts, 1)) * self.prompt_share**0.5
        own = random.standard_normal((prompts, rollouts)) * (1 - self.prompt_share) ** 0.5
        return np.clip(self.median * np.exp(self.sigma * (shared + own)), 1, self.cap).astype(np.int64)

    def describe(self) -> str:
        """Return the distribution as text."""
        capped = 1 - _normal_cdf(np.log(self.cap / self.median) / self.sigma)
        return (
            f"log-normal lengths, median {self.median:.0f}, sigma {self.sigma:g}, {self.prompt_share:.0%} of the "
            f"variance between prompts; {capped:.1%} reach the limit of {self.cap}"
        )


@dataclass(frozen=True)
class RunLengths:
    """Lengths of a run's own rollouts: a prompt is drawn with replacement, then rollouts of it."""

    rows: list[Lengths]  # one array for each prompt and step
    run: Path

    @classmethod
    def of_run(cls, run: Path) -> RunLengths:
        """Read `rollouts/` of a run folder; ConfigError if it holds none."""
        rows: dict[tuple[int, int], list[int]] = {}
        for step, files in rollout_files.complete_steps(run).items():
            for _, rollout in rollout_files.read(files):
                rows.setdefault((step, rollout["slot"]), []).append(max(rollout["tokens"], 1))
        if not rows:
            raise ConfigError(f"{run} holds no rollouts; expected a run folder of `oreal train` with rollouts/*.jsonl")
        return cls([np.array(row) for row in rows.values()], run)

    def draw(self, random: np.random.Generator, prompts: int, rollouts: int) -> Lengths:
        """Return lengths [prompts, rollouts]."""
        chosen = random.integers(len(self.rows), size=prompts)
        return np.stack([random.choice(self.rows[row], rollouts) for row in chosen])

    def describe(self) -> str:
        """Return the source as text."""
        everything = np.concatenate(self.rows)
        return (
            f"lengths of {len(everything)} rollouts of {self.run}: median {np.median(everything):.0f}, "
            f"99th percentile {np.percentile(everything, 99):.0f}, longest {everything.max()}"
        )


def _capped_mean(median: float, sigma: float, cap: int) -> float:
    """Return E[min(X, cap)] of a log-normal X."""
    distance = np.log(cap / median) / sigma
    below = median * np.exp(sigma**2 / 2) * _normal_cdf(distance - sigma)
    return float(below + cap * (1 - _normal_cdf(distance)))


def _normal_cdf(value: float) -> float:
    return NormalDist().cdf(value)
