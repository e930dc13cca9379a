"""Providers of token weights and OREAL loss on packed log-probs: these kernels, plain torch, a loop over sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from oreal_kernels import LossTerms, oreal_loss, token_weights
from oreal_kernels.policy_loss import reference as oreal_loss_reference
from oreal_kernels.scores_to_weights import reference as token_weights_reference
from torch import Tensor

THRESHOLD = 0.5


def rescale(probability: Tensor) -> Tensor:
    """Map [THRESHOLD, 1] to [0, 1] and lower probabilities to 0."""
    return ((probability - THRESHOLD) / (1 - THRESHOLD)).clamp(0, 1)


class LossProviders:
    """Random inputs, `sequences` responses of `tokens` each, every other one correct, and the providers."""

    def __init__(self, sequences: int, tokens: int, device: str):
        self.shape = f"{sequences} x {tokens}"
        total, generator = sequences * tokens, torch.Generator().manual_seed(0)

        def random() -> Tensor:
            return torch.randn(total, generator=generator).to(device)

        outcome = 1.0 - 2 * (torch.arange(sequences, device=device) % 2)
        self.scores, self.logp = random(), random() - 2
        self.labels = torch.zeros(total, dtype=torch.int64, device=device)  # every token is the policy's
        self.terms = LossTerms(
            reference_logp=random() * 0.1 + self.logp,
            weight=torch.ones(total, device=device),
            cu_seqlens=torch.arange(sequences + 1, device=device) * tokens,
            reward=outcome,
            advantage=0.8 * outcome,
            correct_tokens=total // 2, incorrect_tokens=total // 2, action_tokens=total, positive_coef=1.0,
            negative_coef=0.5, kl_coef=0.01, kl_kind="k3", advantage_on_positives=True,
        )  # fmt: skip

    def providers(self, only: str) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Yield name and forward of the providers whose names contain one of the words in `only` (all if empty)."""
        for name, forward in (
            ("loop over sequences", self.loop),
            ("plain torch", lambda: self.packed(token_weights_reference, oreal_loss_reference)),
            ("token_weights + oreal_loss", lambda: self.packed(token_weights, oreal_loss)),
        ):
            if not only or any(word in name for word in only.split(",")):
                yield name, forward

    def fresh_leaf(self) -> Tensor:
        """Return the log-probs as a leaf without gradient."""
        self.leaf = self.logp.detach().requires_grad_()
        return self.leaf

    def packed(self, weights_of: Callable, loss_of: Callable) -> Tensor:
        """Compute weights and loss of all packed sequences at once."""
        terms = self.terms
        weight, _ = weights_of(self.scores, terms.cu_seqlens, terms.reward > 0, (THRESHOLD, THRESHOLD))
        return loss_of(self.fresh_leaf(), replace(terms, weight=weight))[0]

    def loop(self) -> Tensor:
        """Compute sequence by sequence as in InternLM/OREAL's train_oreal.py (2859cc0, lines 752-870) does.

        Left out: the reward model's loss, and the cross entropy and log-probs before it. This is fp32, that is bf16.
        """
        terms, lengths = self.terms, self.terms.cu_seqlens.diff().tolist()
        packed = self.fresh_leaf()[None]
        inputs = (packed, -packed, terms.reference_logp[None], self.scores[None])
        per_sequence = zip(
            *(each.split(lengths, dim=1) for each in inputs), self.labels.split(lengths), terms.reward, terms.advantage,
            strict=True,
        )  # fmt: skip
        positives, negatives, penalties = [], [], []
        for logps, entropies, references, scores, labels, reward, advantage in per_sequence:
            count = (labels >= 0).sum()
            logp, reference, score = logps[0, -count:], references[0, -count:], scores[0, -count:]
            mean_so_far = score.cumsum(0).squeeze() / torch.arange(1, count + 1).to(score.device)
            belief = torch.sigmoid(mean_so_far).detach()
            correct_weight, incorrect_weight = rescale(belief), rescale(1 - belief)
            positive = (entropies[0, -count:] * correct_weight).sum() * advantage
            if reward > 0:
                positives.append(positive / terms.correct_tokens * terms.positive_coef)
                negatives.append(torch.zeros_like(positive))
            else:
                ratio = torch.exp(logp - logp.detach())
                positives.append(torch.zeros_like(positive))
                negatives.append(
                    -torch.sum(ratio * (advantage * incorrect_weight)) / terms.incorrect_tokens * terms.negative_coef
                )
            distance = reference - logp
            unbiased = torch.exp(distance) - distance - 1
            penalties.append((terms.kl_coef * unbiased).sum() / terms.action_tokens)
            for metric in (logp.sum(), (logp.detach() - reference).sum(), advantage.sum(), count):
                metric.item()
        for each in (positives, negatives, penalties):
            sum(each).item()
        return sum(map(sum, zip(positives, negatives, penalties, strict=True)))

    def bare_copy(self) -> Callable[[], None]:
        """Return a copy of as many bytes as the loss must move: scores, log-probs and references in, slopes out."""
        source = torch.cat([self.scores, self.logp])
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
