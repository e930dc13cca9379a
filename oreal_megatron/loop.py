"""OREAL on one page (arXiv 2502.06781, Algorithm 1). Nouns are records, verbs are rooms.

Every rank runs this loop. It is the same with fakes: tests/unit/test_loop.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oreal_megatron import ranks
from oreal_megatron.algo import guard, pack, proof, selection
from oreal_megatron.config import Config
from oreal_megatron.observe.run import Run


def train(
    config: Config,
    prompts: Any,  # .take(step) -> [P] Prompt
    engine: Any,  # .generate(...) -> [P, K] Rollout, .sleep() until the next hand-over
    verifier: Any,  # .submit(rollout), .verdicts(rollouts) -> [P, K] Verdict
    policy: Any,  # .score(batch), .update(batch, reference log-probs, token weights)
    reference: Any,  # .score(batch)
    reward_model: Any,  # .update(batch) -> token weights, metrics
    hand_over: Callable[[int], dict[str, float]],  # the policy's weights, by version -> the engine that lacks them
    run: Run,
    after_step: Callable[[int], None],  # evaluate and save when due
    data_parallel: tuple = (0, 1),  # this rank, ranks, and what else pack.batch takes
) -> None:
    cut = (config.tokens_per_micro_batch, *data_parallel)
    with run.steps() as steps:
        for step in steps:
            seed = (config.seed, step)
            asked = prompts.take(step)  # [P]
            with run.phase("generate"):
                rollouts = engine.generate(asked, config.sampling, seed, verifier.submit)  # [P, K]
            with run.phase("verify"):  # what generation did not overlap
                verdicts = verifier.verdicts(rollouts)  # [P, K]
            with run.phase("prove"):  # before anything is trained on them
                metrics = same_policy(config, engine, policy, rollouts, cut, step)
            engine.sleep()

            samples = selection.samples(rollouts, verdicts, config.selection, seed)  # [N] one right, one wrong a prompt
            metrics |= selection.summary(rollouts, verdicts, samples)
            if samples:
                batch = pack.batch(samples, *cut)  # with the counts of the whole step
                with run.phase("reward_model"):
                    weight, learned = reward_model.update(batch)  # what it believed before this update
                metrics |= learned
                reference_logp = None
                if step >= config.frozen_steps:
                    with run.phase("reference"):
                        reference_logp = reference.score(batch)
                    with run.phase("policy"):
                        metrics |= policy.update(batch, reference_logp, weight)
                run.keep(step, batch, reference_logp, weight, metrics)  # for `oreal replay`
                guard.check(metrics, config.guard, step)  # broken weights go nowhere
            with run.phase("reshard"):
                metrics |= hand_over(policy.updates)
            run.log(step, metrics, rollouts, verdicts)
            after_step(step + 1)


def same_policy(config: Config, engine: Any, policy: Any, rollouts: Any, cut: tuple, step: int) -> dict[str, float]:
    """Compare engine's and trainer's version, and their log-probs of a few sampled tokens; stops the run on a gap."""
    proof.check_versions(rollouts, engine.version, policy.updates, step)
    batch = pack.batch(proof.samples(rollouts, config.engine.proof_tokens), *cut)
    found = ranks.gather(proof.difference(policy.score(batch), batch, config.proof_tolerance))
    return proof.check(found, config.proof_tolerance, policy.updates, step)
