"""Loss term of the user: a function of the policy's log-probs, differentiated by torch, added to the built-in loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from oreal_megatron.config import Config, RunStopped
from oreal_megatron.config.user_functions import read_function
from oreal_megatron.records import ActionTokens, Counts, MicroBatch

PREFIX = "own/"
# Log-probs [T] of a micro-batch's action tokens, everything else of these tokens, denominators -> scalar and metrics.
LossTerm = Callable[[Tensor, ActionTokens, Counts], tuple[Tensor, dict[str, Tensor]]]


def loss_term(config: Config) -> LossTerm | None:
    """Return `loss.term`, None without one; raise ConfigError where it names no function of three arguments."""
    name = config.loss.term
    if not name:
        return None
    function = read_function(name, "loss.term", ("logp_T", "tokens", "counts"))

    def checked_term(logp_T: Tensor, tokens: ActionTokens, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        returned = function(logp_T, tokens, counts)
        value, metrics = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
        return _check_value(value, logp_T, name), _check_metrics(metrics, name)

    return checked_term


def action_tokens(
    micro_batch: MicroBatch, reference_logp_T: Tensor, weight_T: Tensor, old_logp_T: Tensor
) -> ActionTokens:
    """Return the values of a micro-batch's action tokens, those of its sequences repeated for their tokens."""
    lengths = micro_batch.action_offsets.diff()
    numbers = torch.arange(len(lengths), device=lengths.device)
    sequence_T = torch.repeat_interleave(numbers, lengths, output_size=len(micro_batch.labels))
    return ActionTokens(
        reward=micro_batch.reward[sequence_T],
        advantage=micro_batch.advantage[sequence_T],
        weight=weight_T.detach(),
        reference_logp=reference_logp_T.detach(),
        old_logp=old_logp_T.detach(),
        engine_logp=micro_batch.engine_logprobs,
        sequence=sequence_T,
        length=lengths[sequence_T],
    )


def _check_value(value: object, logp_T: Tensor, name: str) -> Tensor:
    """Return the term's value in fp32; raise RunStopped where it is no scalar of this graph."""
    if not isinstance(value, Tensor):
        fault = type(value).__name__
    elif value.ndim:
        fault = f"a tensor of shape {list(value.shape)}"
    elif logp_T.requires_grad and not value.requires_grad:
        fault = "a number that does not depend on logp_T"
    else:
        return value.float()
    raise RunStopped(
        f"loss.term {name} returned {fault}; expected a scalar tensor computed from logp_T by torch, e.g. "
        "-(tokens.advantage * logp_T).sum() / counts.action_tokens"
    )


def _check_metrics(metrics: object, name: str) -> dict[str, Tensor]:
    """Return the term's metrics under the prefix `own/`; raise RunStopped where they are no numbers by name."""
    try:
        assert isinstance(metrics, Mapping)
        return {f"{PREFIX}{key}": torch.as_tensor(float(value)) for key, value in metrics.items()}
    except (AssertionError, TypeError, ValueError, RuntimeError):
        raise RunStopped(
            f"loss.term {name} returned metrics {metrics!r:.200}; expected a dictionary of numbers, sums over tokens "
            "divided by counts, so that micro-batches add up"
        ) from None
