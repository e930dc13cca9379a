"""Cases of the operations on packed tokens and heads, for the stage `kernels` of tools/gpu_acceptance.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import oreal_kernels
import torch
from oreal_kernels import KL_KINDS, SUMS, LossTerms, policy_loss, reward_model_loss, scores_to_weights
from oreal_kernels.prefix_reward_loss import reference as prefix_reward_reference
from oreal_kernels.rotary import reference as rotary_reference
from torch import Tensor

from gpu_stages.comparison import Case, Compute, Results
from gpu_stages.machine import Machine

DTYPES = (torch.float32, torch.bfloat16)
V = TypeVar("V")


def packs(machine: Machine, variants: Sequence[V]) -> Iterator[tuple[str, Results, V]]:
    """Yield name, offsets, outcomes and advantages of a pack with an empty sequence, one token and a filler.

    It is given with each variant; one token alone and 63 tokens are given with the first variant.
    """
    mixed = [140, 0, 1, 81, 300, 64, 7] if machine.dry else [14000, 0, 1, 8191, 65537, 1025, 7]
    for lengths, chosen in (([1], variants[:1]), ([63], variants[:1]), (mixed, variants)):
        outcome = [1.0 if number % 2 == 0 else -1.0 for number in range(len(lengths))]
        if len(lengths) > 1:
            outcome[-1] = 0.0
        reward = torch.tensor(outcome, device=machine.device)
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=machine.device)
        pack = {"offsets": offsets, "reward": reward, "advantage": reward * 0.7 - 0.2 * (reward <= 0)}
        for variant in chosen:
            yield f"{_shown(variant)}, {sum(lengths)} tokens in {len(lengths)} sequences", pack, variant


def tokens_of(pack: Results) -> int:
    """Return the number of tokens of a pack."""
    return int(pack["offsets"][-1])


def token_weights(machine: Machine) -> Iterator[Case]:
    """Yield both beliefs, with scores in float32 and in bfloat16."""
    variants = list(itertools.product(scores_to_weights.BELIEFS, DTYPES))
    for name, pack, (belief, dtype) in packs(machine, variants):
        inputs = pack | {"scores": _scores(machine, pack).to(dtype)}

        def compute(function, values: Results, belief: str = belief) -> Results:
            weights, means = function(values["scores"], values["offsets"], values["reward"] > 0, (0.25, 0.5), belief)
            return {"weights": weights, "means": means}

        functions = oreal_kernels.token_weights, scores_to_weights.reference
        yield _case(name, inputs, (), compute, *functions, longest=pack)


def reward_loss(machine: Machine) -> Iterator[Case]:
    """Yield scores in float32 and in bfloat16."""
    for name, pack, dtype in packs(machine, DTYPES):
        inputs = pack | {"scores": _scores(machine, pack).to(dtype)}

        def compute(function, values: Results) -> Results:
            loss, hits = function(values["scores"], values["offsets"], values["reward"], 7)
            return {"loss": loss, "accuracy": hits}

        functions = oreal_kernels.reward_loss, reward_model_loss.reference
        yield _case(name, inputs, ("scores",), compute, *functions, longest=pack)


def prefix_reward_loss(machine: Machine) -> Iterator[Case]:
    """Yield both beliefs."""
    for name, pack, belief in packs(machine, scores_to_weights.BELIEFS):
        inputs = pack | {"scores": _scores(machine, pack)}

        def compute(function, values: Results, belief: str = belief) -> Results:
            loss, hits = function(values["scores"], values["offsets"], values["reward"], 7, belief)
            return {"loss": loss, "accuracy": hits}

        functions = oreal_kernels.prefix_reward_loss, prefix_reward_reference
        yield _case(name, inputs, ("scores",), compute, *functions, longest=pack)


def oreal_loss(machine: Machine) -> Iterator[Case]:
    """Yield every KL term, advantages on incorrect samples only, and importance ratios; log-probs in both dtypes."""
    variants: list[dict[str, object]] = [{"kl_kind": kind} for kind in KL_KINDS]
    variants += [{"kl_kind": "k3", **more} for more in ({"advantage_on_positives": False}, {"ratio_cap": 2.0})]
    for number, (name, pack, options) in enumerate(packs(machine, variants)):
        logp = (_normal(machine, tokens_of(pack), 1) - 2.3).to(DTYPES[number % 2])
        noise, behaviour = (_normal(machine, tokens_of(pack), seed) for seed in (2, 3))
        behaviour[::7] = torch.nan
        inputs = pack | {
            "logp": logp,
            "reference_logp": logp.float() + 0.3 + noise / 2,
            "behaviour_logp": logp.float() + behaviour,
            "weight": noise.abs().clamp(max=1),
        }

        def compute(function, values: Results, options: dict[str, object] = options) -> Results:
            loss, sums = function(values["logp"], token_terms(values, options))
            return {"loss": loss, **dict(zip(SUMS, sums, strict=True))}

        functions = oreal_kernels.oreal_loss, policy_loss.reference
        yield _case(name, inputs, ("logp",), compute, *functions, longest=pack)


def token_terms(values: Results, options: dict[str, object]) -> LossTerms:
    """Return the terms of a loss; the log-probs of what sampled the tokens only where their ratio is used."""
    tokens = tokens_of(values)
    fixed = dict(correct_tokens=tokens, incorrect_tokens=tokens, action_tokens=tokens, positive_coef=1.0)
    return LossTerms(
        **{name: values[name] for name in ("reference_logp", "weight", "reward", "advantage")},
        cu_seqlens=values["offsets"],
        behaviour_logp=values["behaviour_logp"] if "ratio_cap" in options else None,
        **(fixed | dict(negative_coef=0.5, kl_coef=0.3, advantage_on_positives=True) | options),
    )


def truncated_ratio(machine: Machine) -> Iterator[Case]:
    """Yield log-probs of another distribution that are near, far and unknown."""
    for name, pack, cap in packs(machine, (1.0, 2.0)):
        tokens = tokens_of(pack)
        logp, behaviour = _normal(machine, tokens, 1) - 2.3, _normal(machine, tokens, 2) - 2.3
        behaviour[::7] = torch.nan
        behaviour[1::50] -= 200.0
        behaviour[2::50] += 200.0

        def reference(values: Results, cap: float = cap) -> Results:
            distance = torch.nan_to_num(values["logp"] - values["behaviour_logp"], nan=0.0)
            return {"ratios": torch.minimum(distance.exp(), torch.full_like(distance, cap))}

        def fused(values: Results, cap: float = cap) -> Results:
            return {"ratios": oreal_kernels.truncated_ratio(values["logp"], values["behaviour_logp"], cap)}

        yield Case(name, {"logp": logp, "behaviour_logp": behaviour}, (), fused, reference)


def rotary(machine: Machine) -> Iterator[Case]:
    """Yield slices of a wider projection: one row, heads of odd numbers and widths, many rows."""
    for rows, heads, width in ((1, 1, 128), (63, 28, 128), (63, 7, 80), (65 if machine.dry else 65537, 2, 64)):
        angles = machine.random(rows, width // 2, seed=1).float() * 3000
        inputs = {"x": machine.random(rows, heads, 2 * width), "cos_sin": torch.cat([angles.cos(), angles.sin()], -1)}

        def compute(function, values: Results, width: int = width) -> Results:
            first = width // 2
            return {"rotated": function(values["x"][..., first : first + width], values["cos_sin"])}

        name = f"{rows} x {heads} x {width}"
        yield _case(name, inputs, ("x",), compute, oreal_kernels.rotary, rotary_reference)


def _normal(machine: Machine, count: int, seed: int) -> Tensor:
    """Return normal numbers in float32, whose sums have to be rounded."""
    return machine.random(count, seed=seed).float() * 1.1


def _scores(machine: Machine, pack: Results) -> Tensor:
    """Return scores whose sums are not near 0, where rounding leaves no digits to compare."""
    return _normal(machine, tokens_of(pack), 1) + 0.5


def _shown(variant: object) -> str:
    """Return the text of a variant: a dtype, a name or number, several of them, or options."""
    if isinstance(variant, dict):
        return ", ".join(f"{name} {value}" for name, value in variant.items())
    values = variant if isinstance(variant, tuple) else (variant,)
    return ", ".join(str(value).removeprefix("torch.") for value in values)


def _case(
    name: str,
    inputs: Results,
    leaves: tuple[str, ...],
    compute: Compute,
    fused: object,
    reference: object,
    longest: Results | None = None,
) -> Case:
    """Return a case; sums in float32 are as long as the longest sequence of a pack."""
    summed = int(longest["offsets"].diff().max()) if longest else 1
    return Case(
        name, inputs, leaves, lambda values: compute(fused, values), lambda values: compute(reference, values), summed
    )
