"""Section of generation across steps: prompts in flight, end of generation, unfinished responses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from oreal_megatron.config.schema import FixedKey, Key, Section


@dataclass(frozen=True)
class RolloutConfig(Section):
    """Generation that does not wait for its longest response (docs/how_to/long_tail.md); off with round_tokens=0."""

    round_tokens: Annotated[
        int,
        FixedKey("tokens that a response may grow by in a round, after which generation may end; 0: off", low=0),
    ] = 0
    pool: Annotated[
        float, FixedKey("prompts in flight, as a multiple of data.prompts_per_step; above 1 a step ends early", 1.0, 16)
    ] = 1.0
    enough: Annotated[
        Literal["complete", "mixed"],
        FixedKey("a step ends when data.prompts_per_step prompts have all responses, or these and both outcomes"),
    ] = "complete"
    carry: Annotated[
        bool, FixedKey("unfinished responses continue in the next step, under its weights; else they are thrown away")
    ] = True
    staleness: Annotated[
        int, Key("steps after the first token of a prompt at which it is waited for; older ones are dropped", 0, 64)
    ] = 1

    @property
    def enabled(self) -> bool:
        """True if generation runs in rounds, over a pool of prompts."""
        return self.round_tokens > 0

    @property
    def version_limit(self) -> int:
        """Most versions of the policy between a trained token and the trained weights."""
        return self.staleness if self.enabled and self.carry else 0

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield messages about settings without effect, and a pool that cannot be trained before it is too old."""
        if not self.enabled:
            if self.pool > 1 or self.enough == "mixed":
                setting = f"{path}pool is {self.pool:g}" if self.pool > 1 else f"{path}enough is mixed"
                yield f"{setting}, which needs rounds; set {path}round_tokens, e.g. to 512, or leave it at its default"
        elif self.carry and self.pool > self.staleness + 1:
            yield (
                f"{path}pool is {self.pool:g} and {path}staleness is {self.staleness}: so many prompts cannot be "
                f"trained before they are too old; set {path}staleness to at least {-(-self.pool // 1) - 1:g}, or "
                f"{path}pool to at most {self.staleness + 1}"
            )
