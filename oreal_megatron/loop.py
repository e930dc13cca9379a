"""The training loop of OREAL on one page (arXiv 2502.06781, Algorithm 1).

Every rank runs it; tests/unit/test_loop.py runs it with fakes. Data types and shape letters: records.py. Interfaces:
protocols.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from oreal_megatron.algo import guard, importance, logprob_parity, packing, selection
from oreal_megatron.config import Config
from oreal_megatron.protocols import (
    Dataset,
    Metrics,
    PolicyTrainer,
    RewardModelTrainer,
    RolloutEngine,
    RunRecorder,
    Scorer,
    StepHooks,
    Verifier,
    WeightSync,
)
from oreal_megatron.records import PackingSpec, Rollout
from oreal_megatron.runtime import distributed, rollout_exchange


def train(
    config: Config,
    dataset: Dataset,
    engine: RolloutEngine,
    verifier: Verifier,
    policy: PolicyTrainer,
    reference: Scorer,
    reward_model: RewardModelTrainer,
    weight_sync: WeightSync,
    run: RunRecorder,
    hooks: StepHooks,
    packing_spec: PackingSpec,
) -> None:
    """Train the policy for the steps that remain of the run. Collective."""
    with run.steps() as steps:
        for step in steps:
            seed = (config.seed, step)
            prompts = dataset.take(step)  # [P]
            with run.phase("generate"):
                rollouts = engine.generate(prompts, config.sampling, seed, verifier.submit)  # [P, K]
            with run.phase("verify"):  # grading that did not overlap with generation
                verdicts = verifier.verdicts(rollouts)  # [P, K]
            with run.phase("parity"):  # before anything is trained on these rollouts
                metrics = check_logprob_parity(config, engine, policy, rollouts, packing_spec, step)
            engine.sleep()

            samples = selection.samples(rollouts, verdicts, config.selection, seed)  # [N] one of each outcome a prompt
            metrics |= selection.summary(rollouts, verdicts, samples)
            if samples:
                own = packing.own_numbers(samples, packing_spec, config.loss.mini_batches)
                samples = rollout_exchange.fetch(samples, own)  # from the replicas that generated them
                batch = packing.batch(samples, packing_spec, config.loss.mini_batches)  # with token counts of the step
                with run.phase("reward_model"):
                    token_weights, reward_metrics = reward_model.update(batch)  # weights from before this update
                metrics |= reward_metrics
                reference_logp = None
                if step >= config.frozen_steps:
                    with run.phase("reference"):
                        reference_logp = reference.score(batch)
                    with run.phase("policy"):
                        metrics |= policy.update(batch, reference_logp, token_weights)
                run.dump(step, batch, reference_logp, token_weights, metrics)  # for `oreal replay`
                guard.check(metrics, config.guard, step)  # stops the run before broken weights reach the engine
            with run.phase("weight_sync"):
                metrics |= weight_sync.sync(policy.updates)
            run.log(step, metrics, rollouts, verdicts)
            hooks.after_step(step + 1)


def check_logprob_parity(
    config: Config,
    engine: RolloutEngine,
    policy: PolicyTrainer,
    rollouts: Sequence[Sequence[Rollout]],
    packing_spec: PackingSpec,
    step: int,
) -> Metrics:
    """Compare versions and log-probs of engine and trainer on a few sampled tokens.

    Raises LogprobMismatch on a gap, NonFiniteLogprobs where they are no numbers.
    """
    logprob_parity.check_versions(rollouts, engine.version, policy.updates, step, config.rollout.version_limit)
    if config.loss.ratio_cap:
        importance.require_logprobs(rollouts, step)
    replicas = distributed.world_size() // config.engine.tensor
    samples = logprob_parity.samples(rollouts, config.engine, replicas)
    samples = rollout_exchange.fetch(samples, packing.own_numbers(samples, packing_spec))
    batch = packing.batch(samples, packing_spec)
    gap = logprob_parity.difference(policy.score(batch), batch, config.parity_tolerance_nats)
    gaps = distributed.all_gather_object(gap)
    if not logprob_parity.is_finite(gaps):
        causes = distributed.all_gather_object(policy.find_non_finite(batch))
        logprob_parity.refuse_non_finite(causes, policy.updates, step)
    return logprob_parity.check(gaps, config.parity_tolerance_nats, policy.updates, step)
