"""Token weights and the OREAL loss on packed log-probs: ours, plain torch, and a loop over sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from oreal_kernels import Terms, oreal_loss, token_weights
from oreal_kernels.oreal_loss import reference as oreal_loss_reference
from oreal_kernels.token_weights import reference as token_weights_reference
from torch import Tensor

THRESHOLD = 0.5


class Loss:
    """`sequences` answers of `tokens` each, every other one right."""

    def __init__(self, sequences: int, tokens: int, device: str):
        self.shape = f"{sequences} x {tokens}"
        total, generator = sequences * tokens, torch.Generator().manual_seed(0)

        def random() -> Tensor:
            return torch.randn(total, generator=generator).to(device)

        outcome = 1.0 - 2 * (torch.arange(sequences, device=device) % 2)
        self.scores, self.logp = random(), random() - 2
        self.terms = Terms(
            reference_logp=random() * 0.1 + self.logp,
            weight=torch.ones(total, device=device),
            cu_seqlens=torch.arange(sequences + 1, device=device) * tokens,
            reward=outcome,
            advantage=0.8 * outcome,
            right_tokens=total // 2, wrong_tokens=total // 2, action_tokens=total, positive_coef=1.0,
            negative_coef=0.5, kl_coef=0.01, kl_kind="k3", advantage_on_positives=True,
        )  # fmt: skip

    def providers(self, only: str) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        for name, forward in (
            ("loop over sequences", self.loop),
            ("plain torch", lambda: self.packed(token_weights_reference, oreal_loss_reference)),
            ("token_weights + oreal_loss", lambda: self.packed(token_weights, oreal_loss)),
        ):
            if not only or any(word in name for word in only.split(",")):
                yield name, forward

    def packed(self, weights_of: Callable, loss_of: Callable) -> Tensor:
        terms = self.terms
        weight, _ = weights_of(self.scores, terms.cu_seqlens, terms.reward > 0, THRESHOLD)
        return loss_of(self.logp.detach().requires_grad_(), replace(terms, weight=weight))[0]

    def loop(self) -> Tensor:
        """One sequence after the other, numbers fetched from the device on the way."""
        terms, total = self.terms, 0
        logps = self.logp.detach().requires_grad_()
        borders = terms.cu_seqlens.tolist()
        for i, (first, stop) in enumerate(zip(borders, borders[1:], strict=False)):
            logp, reference = logps[first:stop], terms.reference_logp[first:stop]
            advantage, right = terms.advantage[i].item(), terms.reward[i].item() > 0
            so_far = self.scores[first:stop].cumsum(0) / torch.arange(1, stop - first + 1, device=logp.device)
            belief = torch.sigmoid(so_far)
            merit = belief if right else 1 - belief
            weight = ((merit - THRESHOLD) / (1 - THRESHOLD)).clamp(0, 1).detach()
            if right:
                total = total - (logp * weight).sum() * advantage / terms.right_tokens
            else:
                ratio = torch.exp(logp - logp.detach())
                total = total - 0.5 * (ratio * advantage * weight).sum() / terms.wrong_tokens
            d = reference - logp
            total = total + 0.01 * (torch.exp(d) - d - 1).sum() / terms.action_tokens
            for metric in (weight.mean(), d.mean(), logp.mean()):
                metric.item()
        return total

    def bare_copy(self) -> Callable[[], None]:
        """Reads and writes as many bytes as the loss must: scores, log-probs and references in, slopes out."""
        source = torch.cat([self.scores, self.logp])
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
