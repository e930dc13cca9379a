"""Policy, reference and token-level reward model: Megatron models with the losses of algo/."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from oreal_megatron.algo import guard, loss, loss_term, reward_diagnostics, reward_kl, token_weighting
from oreal_megatron.algo.schedule import learning_rate, policy_rate
from oreal_megatron.config import Config
from oreal_megatron.mcore import gpt_model, output_heads, parallel, trainer
from oreal_megatron.mcore.scorer import MegatronScorer
from oreal_megatron.mcore.trainer import MegatronTrainer, Objective
from oreal_megatron.models import torch_dist_keys
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.models.tensors import Entry
from oreal_megatron.protocols import Metrics
from oreal_megatron.records import Batch, Counts, MicroBatch, ScoredRollout, TokenWeights
from oreal_megatron.runtime import distributed

Reader = Callable[[str], Tensor]
# Number of the micro-batch, the micro-batch, last hidden states, log-probs [T] -> loss and metrics that add up.
ImitationObjective = Callable[[int, MicroBatch, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


def _language_model(
    arch: Architecture, config: Config, read: Reader
) -> tuple[list[GPTModel], output_heads.LanguageModelHead]:
    """Return this rank's chunks of layers with their weights, and the fused head on the last one."""
    chunks = gpt_model.build(arch, config, "lm")
    gpt_model.load(chunks, arch, config, "lm", read)
    budget_bytes, temperature = config.model.logits_mib * 2**20, config.sampling.temperature
    return chunks, output_heads.LanguageModelHead(chunks[-1], arch.vocab, budget_bytes, temperature)


class Reference(MegatronScorer):
    """The fixed reference policy of the KL term: the starting policy."""

    def __init__(self, arch: Architecture, config: Config, read: Reader):
        chunks, self.language_model = _language_model(arch, config, read)
        super().__init__([chunk.requires_grad_(False) for chunk in chunks], self.language_model.log_probs)
        if config.offload:
            self.parts.offload()


class TrainedModel(MegatronTrainer):
    """A trained model whose weights leave Megatron; implements reshard.weight_sync.WeightSource."""

    output_layer = "lm"  # or "scalar"
    arch: Architecture

    def process_groups(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Return the tensor-parallel and the pipeline-parallel group of this rank."""
        return parallel.tensor_and_pipeline_groups()

    def named_shards(self) -> Iterator[tuple[Entry, Tensor]]:
        """Return this rank's parameters with their mapping entries."""
        chunks = [gpt_model.unwrap(chunk) for chunk in self.chunks]
        return gpt_model.named_shards(chunks, self.arch, self.config, self.output_layer)


class Policy(TrainedModel):
    """The policy being trained. The number of its updates is the version that the engine must hold.

    `projections` of distillation are trained beside its weights and are no part of the model.
    """

    def __init__(self, arch: Architecture, config: Config, read: Reader, projections: nn.Module | None = None):
        chunks, self.language_model = _language_model(arch, config, read)
        if projections is not None:
            chunks[-1].add_module(torch_dist_keys.FEATURE_PROJECTION, projections)
        super().__init__(chunks, self.language_model.log_probs, config, config.optimizer)
        self.arch, self.loss_term = arch, loss_term.loss_term(config)

    def update(self, batch: Batch, reference_logp: list[Tensor] | None, token_weights: TokenWeights) -> Metrics:
        """Take one OREAL step on the batch (paper, Eq. 11); skip it where the token weights are not valid.

        With `loss.updates_per_step` the step's mini-batches take turns, an update each. A skipped update ends the step.
        """
        if not token_weights.valid:
            return _prefixed("policy", self.skip())
        reference = reference_logp or []  # empty before the last pipeline stage, where no objective is computed
        kl_metrics: Metrics = {}
        if self.config.loss.reward_kl_coef:
            batch, kl_metrics = self._with_reward_kl(batch, reference)
        objectives = self._objectives(batch, reference, token_weights.values)
        return _prefixed("policy", self._take_turns(objectives) | kl_metrics)

    def _take_turns(self, objectives: list[tuple[Batch, Objective]]) -> Metrics:
        """Update with each objective in turn, `loss.passes` times; return mean metrics, or those of a skipped update.

        The mean is over the updates of the last pass.
        """
        config = self.config.loss
        rate = policy_rate(self.updates // config.updates_per_step, self.config)
        taken: list[Metrics] = []
        with self.parts.on_device(*self.parts):  # offloaded again after the last update only
            for part, objective in objectives * config.passes:
                taken.append(self.train(part, objective, rate))
                if taken[-1]["consecutive_skips"]:  # the policy may be at fault, and not only these samples
                    return taken[-1]
        tokens = [loss.metric_tokens(part.counts, config) for part, _ in objectives]
        return trainer.mean_metrics(taken[-len(objectives) :], tokens)

    def _objectives(
        self, batch: Batch, reference: list[Tensor], weights: list[Tensor]
    ) -> list[tuple[Batch, Objective]]:
        """Return the mini-batches with their losses. Collective.

        Only a loss term reads log-probs from before the first update. With one mini-batch, that update computes them.
        """
        parts = batch.split()
        old_logp = (self.score(batch) or []) if self.loss_term and len(parts) > 1 else []
        return [
            (part, self._objective(part.counts, reference[own], weights[own], old_logp[own])) for own, part in parts
        ]

    def _objective(
        self, counts: Counts, reference: list[Tensor], weights: list[Tensor], old_logps: list[Tensor]
    ) -> Objective:
        """Return OREAL's loss, with `loss.term` if there is one. Without old log-probs, its first use finds them."""
        config, model, term = self.config.loss, self.language_model, self.loss_term
        old_logp = dict(enumerate(old_logps))

        def fused(number: int, micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return model.oreal_loss(hidden, micro_batch, reference[number], weights[number], counts, config)

        if term is None:
            return fused

        def with_term(number: int, micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            values = reference[number], weights[number]

            def of_log_probs(logp_T: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                old_logp_T = old_logp.setdefault(number, logp_T.detach())
                return term(logp_T, loss_term.action_tokens(micro_batch, *values, old_logp_T), counts)

            return model.loss_with_term(hidden, micro_batch, *values, counts, config, of_log_probs)

        return with_term

    def _with_reward_kl(self, batch: Batch, reference_logp: list[Tensor]) -> tuple[Batch, Metrics]:
        """Return the batch with the KL divergence of each response in its advantage, and their mean. Collective."""
        own = reward_kl.response_kls(self.score(batch) or [], reference_logp, batch.micro_batches)
        kls = {key: kl for share in distributed.all_gather_object(own) for key, kl in share.items()}
        centred = reward_kl.centre(kls)
        mean = sum(kls.values()) / max(len(kls), 1)
        coefficient = self.config.loss.reward_kl_coef
        return reward_kl.with_kl_in_advantages(batch, centred, coefficient), {"response_kl": mean}

    def imitate(self, batch: Batch) -> tuple[list[Tensor], Metrics]:
        """Take one supervised step; return the tokens' log-probs [T] by micro-batch, of before the step, and metrics.

        There are none before the last pipeline stage.
        """
        return self.train_supervised(batch, lambda number, part, hidden, logp_T: loss.supervised(logp_T, batch.counts))

    def train_supervised(self, batch: Batch, objective: ImitationObjective) -> tuple[list[Tensor], Metrics]:
        """Take one step of an objective with the optimizer of section `supervised`; returns as `imitate`."""
        logp: dict[int, Tensor] = {}

        def with_log_probs(number: int, micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logp_T = self.head(hidden, micro_batch)
            logp[number] = logp_T.detach()
            return objective(number, micro_batch, hidden, logp_T)

        config = self.config.supervised
        rate = learning_rate(self.updates, config.steps, config.optimizer)
        metrics = _prefixed("policy", self.train(batch, with_log_probs, rate))
        return _in_order(logp), metrics


class TokenRewardModel(TrainedModel):
    """The policy's architecture with a scalar head, trained on outcomes (algo/loss.py).

    `read` reads the policy, or the reward model that `reward_model.path` names.
    """

    output_layer = "scalar"

    def __init__(self, arch: Architecture, config: Config, read: Reader):
        stage = gpt_model.build(arch, config, "scalar")
        if not config.reward_model.path:
            read = _with_fresh_head(arch, config, read)
        gpt_model.load(stage, arch, config, "scalar", read)
        head = partial(output_heads.token_scores, score_at=config.reward_model.score_at)
        super().__init__(stage, head, config, config.reward_model.optimizer)
        self.arch, self.weight_rule = arch, token_weighting.weight_rule(config)

    def scored_rollouts(self, batch: Batch) -> tuple[ScoredRollout, ...]:
        """Return the rollouts of the batch on all ranks with their mean scores, without training. Collective."""
        return _gather_scored_rollouts(batch, self.score(batch) or [])

    def update(self, batch: Batch) -> tuple[TokenWeights, Metrics]:
        """Take one step; return the token weights of the same forward pass, thus from before the step, and metrics."""
        scores: dict[int, Tensor] = {}
        weights: dict[int, Tensor] = {}

        def objective(number: int, micro_batch: MicroBatch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            score_T = self.head(output, micro_batch)
            scores[number] = score_T.detach()
            weights[number] = self.weight_rule(score_T.detach(), micro_batch, self.config)
            total, metrics = loss.reward_model(score_T, micro_batch, batch.counts, self.config)
            return total, metrics | token_weighting.metrics(weights[number], micro_batch, batch.counts)

        rate = learning_rate(self.updates, self.config.steps, self.config.reward_model.optimizer)
        metrics = _prefixed("reward_model", self.train(batch, objective, rate))
        if guard.skipped_models(metrics):
            return TokenWeights([], valid=False), metrics
        values = _in_order(weights)
        if self.config.weights.shuffle and values:
            seed = (self.config.seed, self.updates, parallel_state.get_data_parallel_rank())
            values = token_weighting.shuffle(values, batch, seed)
        rollouts = _gather_scored_rollouts(batch, _in_order(scores))
        token_weights = TokenWeights(values, scores=_in_order(scores), rollouts=rollouts)
        return token_weights, metrics | reward_diagnostics.metrics(rollouts)


class NoRewardModel:
    """Stand-in for a reward model that is switched off: every token weighs 1, or what `weights.rule` says."""

    def __init__(self, config: Config):
        self.config = config
        self.weight_rule = token_weighting.weight_rule(config) if config.weights.rule else None

    def update(self, batch: Batch) -> tuple[TokenWeights, Metrics]:
        """Return the weights and no metrics."""
        return TokenWeights([self._weights(part.to(gpt_model.device())) for part in batch.micro_batches]), {}

    def _weights(self, micro_batch: MicroBatch) -> Tensor:
        score_T = torch.zeros(len(micro_batch.labels), device=micro_batch.labels.device)
        return self.weight_rule(score_T, micro_batch, self.config) if self.weight_rule else score_T + 1


def _gather_scored_rollouts(batch: Batch, scores: Sequence[Tensor]) -> tuple[ScoredRollout, ...]:
    """Return the rollouts of the batch on all ranks with their mean scores, by slot and index. Collective."""
    scored = [
        rollout
        for score_T, micro_batch in zip(scores, batch.micro_batches, strict=False)
        for rollout in reward_diagnostics.scored_rollouts(score_T, micro_batch)
    ]
    replicas = distributed.all_gather_object(scored if parallel.replica_share() else [])
    rollouts = [rollout for replica in replicas for rollout in replica]
    return tuple(sorted(rollouts, key=lambda rollout: (rollout.slot, rollout.index)))


def _in_order(values: dict[int, Tensor]) -> list[Tensor]:
    """Return the values of the micro-batches in their order; the last pipeline stage has all, the others none."""
    return [values[number] for number in sorted(values)]


def _prefixed(model: str, metrics: Metrics) -> Metrics:
    """Prefix metrics with the model's name, unless they have a prefix already."""
    return {name if "/" in name else f"{model}/{name}": value for name, value in metrics.items()}


def _with_fresh_head(arch: Architecture, config: Config, read: Reader) -> Reader:
    """Read the backbone from the policy. The scalar head is zero, or drawn like the policy's matrices, on every rank.

    Zero is what the authors' loader makes of it: a policy's lm_head has another shape. All beliefs are then 0.5.
    """

    def read_or_draw(name: str) -> Tensor:
        if name != "score.weight":
            return read(name)
        if config.reward_model.head_init == "zeros":
            return torch.zeros(1, arch.hidden)
        return torch.randn(1, arch.hidden, generator=torch.Generator().manual_seed(config.seed)) * 0.02

    return read_or_draw
