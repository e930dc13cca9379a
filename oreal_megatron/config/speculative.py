"""Section of speculative decoding: drafts of the next tokens that the policy verifies in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from oreal_megatron.config.schema import InputKey, Key, Section

DRAFT_MODELS = ("draft_model", "eagle", "eagle3")  # methods with weights of their own


@dataclass(frozen=True)
class SpeculativeConfig(Section):
    """Speculative decoding in the engine: faster where few responses are in flight; it changes no token."""

    method: Annotated[
        Literal["", "ngram", "suffix", "draft_model", "eagle", "eagle3"],
        Key("source of the drafts: n-grams of the response, vLLM's suffix trees, a smaller model, heads; empty: off"),
    ] = ""
    tokens: Annotated[int, Key("tokens that are drafted for a response at once", 1, 64)] = 4
    ngram_min: Annotated[int, Key("shortest n-gram that is looked up", 1, 64, "tokens")] = 2
    ngram_max: Annotated[int, Key("longest n-gram that is looked up", 1, 64, "tokens")] = 4
    model: Annotated[str, InputKey("Hugging Face folder of the draft model or of the heads")] = ""

    @property
    def enabled(self) -> bool:
        """True if the engine drafts tokens."""
        return bool(self.method)

    def arguments(self) -> dict[str, Any]:
        """Return vLLM's `speculative_config`."""
        values: dict[str, Any] = {"method": self.method, "num_speculative_tokens": self.tokens}
        if self.method == "ngram":
            values |= {"prompt_lookup_min": self.ngram_min, "prompt_lookup_max": self.ngram_max}
        if self.method in DRAFT_MODELS:
            values["model"] = self.model
        return values

    def conflicts(self, path: str) -> Iterator[str]:
        """Yield messages about a draft model that is missing or unused, and n-grams of no length."""
        if self.method in DRAFT_MODELS and not self.model:
            yield f"{path}method is {self.method}, which needs a model; set {path}model to its folder"
        if self.model and self.method not in DRAFT_MODELS:
            yield (
                f"{path}model is {self.model!r}, but {path}method is {self.method!r}, which has none; unset it, or set "
                f"{path}method to one of {', '.join(DRAFT_MODELS)}"
            )
        if self.ngram_min > self.ngram_max:
            yield (
                f"{path}ngram_min is {self.ngram_min} and {path}ngram_max {self.ngram_max}: no n-gram has such a "
                f"length; set {path}ngram_min to at most {self.ngram_max}"
            )
