"""OREAL's policy loss on log-probs (Eq. 11 of arXiv 2502.06781, as in the authors' code), for packed sequences.

    correct tokens:    - positive_coef A w logp / correct tokens        imitation, weighted by the advantage
    incorrect tokens:  - negative_coef A w r / incorrect tokens         r = exp(logp - logp.detach()) = 1, or with a
                                                                        ratio_cap rho r, rho = truncated_ratio(...)
    all tokens:          kl_coef KL(d) / action tokens                  d = reference log-prob - logp
    all tokens:        - entropy_coef entropy / action tokens           from hidden states only (hidden_to_loss.py)

Every token's gradient depends on its own log-prob only, so one pass gives loss, metrics and dL/dlogp.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from oreal_kernels import backend, input_checks, native, triton_launch
from oreal_kernels.importance import truncated_ratio
from oreal_kernels.scores_to_weights import sequence_of_token

KL_KINDS = {"k1": 1, "k1_reversed": -1, "k2": 2, "k3": 3}
SUMS = ("correct", "incorrect", "k1", "k2", "k3", "logp", "correct_weight", "incorrect_weight")
MAX_DISTANCE = 60.0  # nats; a larger distance to the reference counts as this, because its exp would overflow fp32


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Everything in the loss but the policy's log-probs, for B packed sequences of T action tokens.

    Raises ValueError for an unknown kl_kind.
    """

    reference_logp: Tensor  # [T] log-probs of the reference policy, nats
    weight: Tensor  # [T] token weights in [0, 1]
    cu_seqlens: Tensor  # [B + 1] int64, cumulative lengths of the sequences, from 0 to T
    reward: Tensor  # [B] above 0: correct, else incorrect
    advantage: Tensor  # [B]
    correct_tokens: int  # divisor of the correct term: action tokens of correct samples in the step, over all ranks
    incorrect_tokens: int  # divisor of the incorrect term: likewise of incorrect samples
    action_tokens: int  # divisor of the KL term: likewise of all samples
    positive_coef: float  # factor of the correct samples' term
    negative_coef: float  # factor of the incorrect samples' term
    kl_coef: float  # factor of the KL term
    kl_kind: str  # one of KL_KINDS; k1 is -d, k1_reversed d, k2 d^2 / 2, k3 exp(d) - d - 1
    advantage_on_positives: bool  # multiply the correct samples' term by the advantage
    behaviour_logp: Tensor | None = None  # [T] log-probs of what sampled the tokens, nats; nan: the policy itself
    ratio_cap: float = 0.0  # largest importance ratio of an incorrect sample's token, at least 1; 0: it is not weighted
    entropy_coef: float = 0.0  # factor of the mean entropy, which the loss falls with

    def __post_init__(self):
        if self.kl_kind not in KL_KINDS:
            raise ValueError(f"kl_kind is {self.kl_kind!r}; expected one of {', '.join(KL_KINDS)}")
        if self.ratio_cap and self.behaviour_logp is None:
            raise ValueError(f"ratio_cap is {self.ratio_cap:g}, which needs behaviour_logp; got None")

    @property
    def scales(self) -> tuple[float, float, float]:
        """Factors of the sums over correct, incorrect and all tokens."""
        return (
            self.positive_coef / max(self.correct_tokens, 1),
            self.negative_coef / max(self.incorrect_tokens, 1),
            self.kl_coef / max(self.action_tokens, 1),
        )

    @property
    def entropy_scale(self) -> float:
        """Factor of the sum of entropies."""
        return self.entropy_coef / max(self.action_tokens, 1)

    def check(self, tokens: int) -> None:
        """Raise ValueError where shapes do not fit the action tokens, or cu_seqlens does not rise from 0 to them."""
        sequences = input_checks.check_offsets(self.cu_seqlens, tokens)
        for name, length in (
            ("reference_logp", tokens),
            ("weight", tokens),
            ("reward", sequences),
            ("advantage", sequences),
        ):
            input_checks.check_length(name, getattr(self, name), length)
        if self.behaviour_logp is not None:
            input_checks.check_length("behaviour_logp", self.behaviour_logp, tokens)

    def contiguous(self) -> LossTerms:
        """Return the terms as kernels read them: contiguous, cu_seqlens int64, other tensors fp32 (or fp64)."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        names = ("reference_logp", "weight", "reward", "advantage")
        tensors = {name: getattr(self, name).to(wide).contiguous() for name in names}
        return replace(self, cu_seqlens=self.cu_seqlens.long().contiguous(), **tensors)

    def select(self, tokens: slice) -> LossTerms:
        """Return the terms of a range of tokens; sequences outside of it become empty."""
        return replace(
            self,
            reference_logp=self.reference_logp[tokens],
            weight=self.weight[tokens],
            cu_seqlens=self.cu_seqlens.clamp(tokens.start, tokens.stop) - tokens.start,
            behaviour_logp=None if self.behaviour_logp is None else self.behaviour_logp[tokens],
        )

    def with_ratio(self, logp: Tensor) -> LossTerms:
        """Return the terms with the truncated importance ratio of the policy's log-probs in the incorrect weights."""
        if self.behaviour_logp is None or not self.ratio_cap:
            return self
        ratio = truncated_ratio(logp, self.behaviour_logp, self.ratio_cap)
        correct = (self.reward > 0)[sequence_of_token(self.cu_seqlens, len(logp))]
        return replace(self, weight=torch.where(correct, self.weight, self.weight * ratio), ratio_cap=0.0)

    def loss(self, sums: Tensor) -> Tensor:
        """Return the loss (fp32 scalar) from the sums [8]."""
        correct_scale, incorrect_scale, kl_scale = self.scales
        kl = {"k1": sums[2], "k1_reversed": -sums[2], "k2": sums[3], "k3": sums[4]}[self.kl_kind]
        return (-correct_scale * sums[0] - incorrect_scale * sums[1] + kl_scale * kl).float()


def reference(logp: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """Compute the loss, differentiated by torch, and the sums [8]; in fp64 if the log-probs are."""
    wide = torch.promote_types(logp.dtype, torch.float32)
    terms = terms.with_ratio(logp)
    logp, weight = logp.to(wide), terms.weight.to(wide)
    owner = sequence_of_token(terms.cu_seqlens, len(logp))
    correct, advantage = (terms.reward > 0)[owner], terms.advantage.to(wide)[owner]
    distance = terms.reference_logp.to(wide) - logp
    d = distance + (distance.clamp(-MAX_DISTANCE, MAX_DISTANCE) - distance).detach()  # clamps value, not slope
    ratio = torch.exp(logp - logp.detach())
    merit = weight * advantage if terms.advantage_on_positives else weight
    sums = torch.stack(
        [
            torch.where(correct, merit * logp, 0).sum(),
            torch.where(correct, 0, ratio * weight * advantage).sum(),
            -d.sum(),
            (d * d / 2).sum(),
            (torch.expm1(d) - d).sum(),
            logp.sum(),
            torch.where(correct, weight, 0).sum(),
            torch.where(correct, 0, weight).sum(),
        ]
    )
    return terms.loss(sums), sums.detach().double()


@triton.jit(do_not_specialize=["tokens"])
def terms_kernel(
    logp, reference_logp, weight, owner, reward, advantage, slope, sums, tokens, correct_scale, incorrect_scale,
    kl_scale,
    KL_KIND: tl.constexpr, ADVANTAGE_ON_POSITIVES: tl.constexpr, MAX_DISTANCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dL/dlogp of BLOCK tokens per program, and their sums [8]."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    sequence = tl.load(owner + token, mask=inside, other=0)
    correct = tl.load(reward + sequence, mask=inside, other=0.0) > 0.0
    own = tl.load(advantage + sequence, mask=inside, other=0.0)
    w = tl.load(weight + token, mask=inside, other=0.0)
    value = tl.load(logp + token, mask=inside, other=0.0)
    d = tl.load(reference_logp + token, mask=inside, other=0.0) - value
    d = tl.minimum(tl.maximum(d, -MAX_DISTANCE), MAX_DISTANCE)
    exp_d = tl.exp(d)
    # exp(d) - d - 1, and 1 - exp(d), by their series near 0, where the digits cancel.
    tail = 1.0 + d / 4.0 * (1.0 + d / 5.0 * (1.0 + d / 6.0))
    k3 = tl.where(tl.abs(d) < 0.25, d * d / 2.0 * (1.0 + d / 3.0 * tail), exp_d - d - 1.0)
    merit = w * own if ADVANTAGE_ON_POSITIVES else w
    if KL_KIND == 1:
        pull = 1.0
    elif KL_KIND == -1:
        pull = -1.0
    elif KL_KIND == 2:
        pull = -d
    else:
        pull = tl.where(tl.abs(d) < 0.25, -d * (1.0 + d / 2.0 * (1.0 + d / 3.0 * tail)), 1.0 - exp_d)
    push = tl.where(correct, correct_scale * merit, incorrect_scale * w * own)
    tl.store(slope + token, kl_scale * pull - push, mask=inside)
    target_row = sums + tl.program_id(0) * 8
    tl.store(target_row, tl.sum(tl.where(correct, merit * value, 0.0), 0))
    tl.store(target_row + 1, tl.sum(tl.where(correct, 0.0, w * own), 0))
    tl.store(target_row + 2, -tl.sum(d, 0))
    tl.store(target_row + 3, tl.sum(d * d / 2.0, 0))
    tl.store(target_row + 4, tl.sum(k3, 0))
    tl.store(target_row + 5, tl.sum(value, 0))
    tl.store(target_row + 6, tl.sum(tl.where(correct, w, 0.0), 0))
    tl.store(target_row + 7, tl.sum(tl.where(correct, 0.0, w), 0))


def policy_terms(logp: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """Return dL/dlogp [T] fp32 and the sums [8] fp64; the same bits in every run."""
    logp, terms = logp.detach().contiguous(), terms.with_ratio(logp).contiguous()
    served_by = backend.choose(logp, terms.reference_logp, terms.weight)
    if served_by == "native":
        return native.policy_terms(
            logp, terms.reference_logp, terms.weight, terms.cu_seqlens, terms.reward, terms.advantage,
            advantage_on_positives=terms.advantage_on_positives, correct_scale=terms.scales[0],
            incorrect_scale=terms.scales[1], kl_scale=terms.scales[2], kl_kind=KL_KINDS[terms.kl_kind],
        )  # fmt: skip
    if served_by == "reference" or not len(logp):
        with torch.enable_grad():
            leaf = logp.requires_grad_()
            loss, sums = reference(leaf, terms)
            return torch.autograd.grad(loss, leaf)[0], sums
    kernel_options = triton_launch.options("policy_terms", logp.device)
    programs = triton.cdiv(len(logp), kernel_options["BLOCK"])
    owner = sequence_of_token(terms.cu_seqlens, len(logp))
    slope = torch.empty_like(logp)
    sums = torch.empty(programs, len(SUMS), dtype=torch.float32, device=logp.device)
    terms_kernel[(programs,)](
        logp, terms.reference_logp, terms.weight, owner, terms.reward, terms.advantage,
        slope, sums, len(logp), *terms.scales, KL_KIND=KL_KINDS[terms.kl_kind],
        ADVANTAGE_ON_POSITIVES=terms.advantage_on_positives, MAX_DISTANCE=MAX_DISTANCE, **kernel_options,
    )  # fmt: skip
    return slope, sums.double().sum(0)


class _OrealLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, terms):
        slope, sums = policy_terms(logp.float(), terms)
        ctx.save_for_backward(slope)
        ctx.dtype = logp.dtype
        ctx.mark_non_differentiable(sums)
        return terms.loss(sums), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        (slope,) = ctx.saved_tensors
        return (slope * grad_loss).to(ctx.dtype), None


def oreal_loss(logp: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """Compute OREAL's policy loss; both results are plain sums, so that micro-batches and ranks add up.

    Args:
        logp: [T] log-probs of the policy, nats, fp32 or bf16; differentiable.
        terms: everything else in the loss.

    Returns:
        The loss (fp32 scalar) and its sums [8] (fp64, detached, named by SUMS).

    Raises:
        ValueError: shapes do not fit, cu_seqlens does not rise from 0 to T (on a GPU at a later call), or
            `terms.entropy_coef` is not 0.
    """
    if terms.entropy_coef:
        raise ValueError(
            f"terms.entropy_coef is {terms.entropy_coef}, but log-probs of the labels have no entropy; set it to 0, or "
            "use linear_oreal_loss"
        )
    terms.check(len(logp))
    return _OrealLoss.apply(logp, terms)
