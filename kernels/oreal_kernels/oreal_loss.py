"""OREAL's policy loss on log-probs (Eq. 11 of arXiv 2502.06781 as the authors' code has it), for sequences end to end.

    right tokens:  - positive_coef A w logp / right tokens          imitation, weighted by the advantage
    wrong tokens:  - negative_coef A w r / wrong tokens             r = exp(logp - logp.detach()) = 1
    all tokens:      kl_coef KL(d) / action tokens                  d = reference log-prob - logp

Every token's gradient is a number that needs its own log-prob alone, so one pass gives loss, metrics and dL/dlogp.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from oreal_kernels import backend, native, triton_launch
from oreal_kernels.token_weights import owners

KL_KINDS = {"k1": 1, "k1_reversed": -1, "k2": 2, "k3": 3}
SUMS = ("right", "wrong", "k1", "k2", "k3", "logp", "right_weight", "wrong_weight")
FARTHEST = 60.0  # nats: exp of a larger distance to the reference leaves fp32; it counts as this much


@dataclass(frozen=True, slots=True)
class Terms:
    """All of the loss that is known before the policy's log-probs are."""

    reference_logp: Tensor  # [T]
    weight: Tensor  # [T] token weights
    cu_seqlens: Tensor  # [B + 1] int64
    reward: Tensor  # [B] > 0: right
    advantage: Tensor  # [B]
    correct_tokens: int  # of the whole step, over all ranks
    incorrect_tokens: int
    action_tokens: int
    positive_coef: float
    negative_coef: float
    kl_coef: float
    kl_kind: str
    advantage_on_positives: bool

    def __post_init__(self):
        if self.kl_kind not in KL_KINDS:
            raise ValueError(f"kl_kind is {self.kl_kind!r}; wanted one of {', '.join(KL_KINDS)}")

    @property
    def scales(self) -> tuple[float, float, float]:
        """What multiplies the sums of right, wrong and all tokens."""
        return (
            self.positive_coef / max(self.correct_tokens, 1),
            self.negative_coef / max(self.incorrect_tokens, 1),
            self.kl_coef / max(self.action_tokens, 1),
        )

    def contiguous(self) -> Terms:
        """The same as the kernels read it: one number after the other; int64 borders, the rest fp32 (or fp64)."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        names = ("reference_logp", "weight", "reward", "advantage")
        read = {name: getattr(self, name).to(wide).contiguous() for name in names}
        return replace(self, cu_seqlens=self.cu_seqlens.long().contiguous(), **read)

    def cut(self, tokens: slice) -> Terms:
        """The same of a range of tokens; sequences outside of it become empty."""
        return replace(
            self,
            reference_logp=self.reference_logp[tokens],
            weight=self.weight[tokens],
            cu_seqlens=self.cu_seqlens.clamp(tokens.start, tokens.stop) - tokens.start,
        )

    def loss(self, sums: Tensor) -> Tensor:
        """Scalar fp32 of the sums [8]."""
        right_scale, wrong_scale, kl_scale = self.scales
        kl = {"k1": sums[2], "k1_reversed": -sums[2], "k2": sums[3], "k3": sums[4]}[self.kl_kind]
        return (-right_scale * sums[0] - wrong_scale * sums[1] + kl_scale * kl).float()


def reference(logp: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Loss and sums [8], the loss differentiated by torch; in fp64 if the log-probs are."""
    wide = torch.promote_types(logp.dtype, torch.float32)
    logp, weight = logp.to(wide), terms.weight.to(wide)
    owner = owners(terms.cu_seqlens, len(logp))
    right, advantage = (terms.reward > 0)[owner], terms.advantage.to(wide)[owner]
    far = terms.reference_logp.to(wide) - logp
    d = far + (far.clamp(-FARTHEST, FARTHEST) - far).detach()  # clamped in value, not in slope
    ratio = torch.exp(logp - logp.detach())
    merit = weight * advantage if terms.advantage_on_positives else weight
    sums = torch.stack(
        [
            torch.where(right, merit * logp, 0).sum(),
            torch.where(right, 0, ratio * weight * advantage).sum(),
            -d.sum(),
            (d * d / 2).sum(),
            (torch.expm1(d) - d).sum(),
            logp.sum(),
            torch.where(right, weight, 0).sum(),
            torch.where(right, 0, weight).sum(),
        ]
    )
    return terms.loss(sums), sums.detach().double()


@triton.jit(do_not_specialize=["tokens"])
def terms_kernel(
    logp, reference_logp, weight, owner, reward, advantage, slope, sums, tokens, right_scale, wrong_scale, kl_scale,
    KL_KIND: tl.constexpr, ADVANTAGE_ON_POSITIVES: tl.constexpr, FARTHEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    sequence = tl.load(owner + token, mask=inside, other=0)
    right = tl.load(reward + sequence, mask=inside, other=0.0) > 0.0
    own = tl.load(advantage + sequence, mask=inside, other=0.0)
    w = tl.load(weight + token, mask=inside, other=0.0)
    value = tl.load(logp + token, mask=inside, other=0.0)
    d = tl.load(reference_logp + token, mask=inside, other=0.0) - value
    d = tl.minimum(tl.maximum(d, -FARTHEST), FARTHEST)
    grown = tl.exp(d)
    # exp(d) - d - 1, and 1 - exp(d), by their series near 0, where the digits cancel.
    tail = 1.0 + d / 4.0 * (1.0 + d / 5.0 * (1.0 + d / 6.0))
    k3 = tl.where(tl.abs(d) < 0.25, d * d / 2.0 * (1.0 + d / 3.0 * tail), grown - d - 1.0)
    merit = w * own if ADVANTAGE_ON_POSITIVES else w
    if KL_KIND == 1:
        pull = 1.0
    elif KL_KIND == -1:
        pull = -1.0
    elif KL_KIND == 2:
        pull = -d
    else:
        pull = tl.where(tl.abs(d) < 0.25, -d * (1.0 + d / 2.0 * (1.0 + d / 3.0 * tail)), 1.0 - grown)
    push = tl.where(right, right_scale * merit, wrong_scale * w * own)
    tl.store(slope + token, kl_scale * pull - push, mask=inside)
    place = sums + tl.program_id(0) * 8
    tl.store(place, tl.sum(tl.where(right, merit * value, 0.0), 0))
    tl.store(place + 1, tl.sum(tl.where(right, 0.0, w * own), 0))
    tl.store(place + 2, -tl.sum(d, 0))
    tl.store(place + 3, tl.sum(d * d / 2.0, 0))
    tl.store(place + 4, tl.sum(k3, 0))
    tl.store(place + 5, tl.sum(value, 0))
    tl.store(place + 6, tl.sum(tl.where(right, w, 0.0), 0))
    tl.store(place + 7, tl.sum(tl.where(right, 0.0, w), 0))


def policy_terms(logp: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """dL/dlogp [T] fp32 and sums [8] fp64; the same bits in every run."""
    logp, terms = logp.detach().contiguous(), terms.contiguous()
    served_by = backend.choose(logp, terms.reference_logp, terms.weight)
    if served_by == "native":
        return native.policy_terms(
            logp, terms.reference_logp, terms.weight, terms.cu_seqlens, terms.reward, terms.advantage,
            advantage_on_positives=terms.advantage_on_positives, right_scale=terms.scales[0],
            wrong_scale=terms.scales[1], kl_scale=terms.scales[2], kl_kind=KL_KINDS[terms.kl_kind],
        )  # fmt: skip
    if served_by == "reference" or not len(logp):
        with torch.enable_grad():
            leaf = logp.requires_grad_()
            loss, sums = reference(leaf, terms)
            return torch.autograd.grad(loss, leaf)[0], sums
    kernel_options = triton_launch.options("policy_terms", logp.device)
    programs = triton.cdiv(len(logp), kernel_options["BLOCK"])
    slope = torch.empty_like(logp)
    sums = torch.empty(programs, len(SUMS), dtype=torch.float32, device=logp.device)
    terms_kernel[(programs,)](
        logp, terms.reference_logp, terms.weight, owners(terms.cu_seqlens, len(logp)), terms.reward, terms.advantage,
        slope, sums, len(logp), *terms.scales, KL_KIND=KL_KINDS[terms.kl_kind],
        ADVANTAGE_ON_POSITIVES=terms.advantage_on_positives, FARTHEST=FARTHEST, **kernel_options,
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


def oreal_loss(logp: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """The loss of some tokens, fp32, differentiable in logp [T], and its sums [8] (named by SUMS), fp64, detached.

    Both are plain sums: micro-batches and ranks add up.
    """
    return _OrealLoss.apply(logp, terms)
