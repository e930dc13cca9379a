"""Mini-batches of a step: bit for bit the updates that one would take by hand, and the same on two replicas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

# The ratio to the log-probs before the step, and to those that the test gives as the engine's.
TERMS = """
import torch

def _clipped(logp_T, tokens, counts, old_logp):
    ratio_T = torch.exp(logp_T - old_logp)
    gain_T = torch.minimum(ratio_T * tokens.advantage, ratio_T.clamp(0.8, 1.2) * tokens.advantage)
    return -gain_T.sum() / counts.action_tokens, {"moved": (ratio_T - 1).abs().sum() / counts.action_tokens}

def old(logp_T, tokens, counts):
    return _clipped(logp_T, tokens, counts, tokens.old_logp)

def given(logp_T, tokens, counts):
    return _clipped(logp_T, tokens, counts, tokens.engine_logp)
"""
OLD, GIVEN = dict(negative_coef=0.0, term="old"), dict(negative_coef=0.0, term="given")
BUILT_IN = dict(ratio_cap=2.0)  # ratio to the engine's log-probs
PARTS = [slice(0, 4), slice(4, 5)]  # samples of three prompts in two mini-batches; the last is of one sample


class Case:
    """A policy with constant learning rate, in this rank's process."""

    def __init__(self, folder: str, terms: str, loss: dict, updates: int = 1, mini_batches: int = 1):
        from oreal_megatron import config as c
        from oreal_megatron.convert.hf_folder import HFFolder
        from oreal_megatron.mcore import parallel, trained_models
        from oreal_megatron.models import architecture

        named = {"term": f"{terms}:{loss['term']}"} if "term" in loss else {}
        self.config = c.Config(
            optimizer=c.OptimizerConfig(lr=1e-3, min_lr=1e-3, warmup_steps=0, clip_grad=1e9),
            reward_model=c.RewardModelConfig(enabled=False),
            loss=c.LossConfig(**loss | named | dict(kl_coef=0.5, updates_per_step=updates, mini_batches=mini_batches)),
        )
        source = HFFolder(folder)
        pieces = (architecture.read(source.config), self.config, source.tensor)
        self.policy, self.reference = trained_models.Policy(*pieces), trained_models.Reference(*pieces)
        self.weigh, self.spec = trained_models.NoRewardModel(self.config).update, parallel.packing_spec(40)

    def batch(self, samples: list):
        from oreal_megatron.algo import packing

        return packing.batch(samples, self.spec, self.config.loss.mini_batches)

    def update(self, samples: list) -> dict[str, float]:
        batch = self.batch(samples)
        return self.policy.update(batch, self.reference.score(batch), self.weigh(batch)[0])

    def with_own_logprobs(self, samples: list) -> list:
        """The samples with the policy's log-probs as the engine's, computed in the given batch."""
        batch, values = self.batch(samples), {}
        for logp_T, part in zip(self.policy.score(batch), batch.micro_batches, strict=True):
            rows = logp_T.split(part.action_offsets.diff().tolist())
            values |= dict(zip(map(tuple, part.rollouts.tolist()), rows, strict=True))
        return [dataclasses.replace(s, engine_logprobs=tuple(values[s.rollout].tolist())) for s in samples]

    def weights(self) -> list[torch.Tensor]:
        from oreal_megatron.mcore.scorer import parameters

        with self.policy.readable():
            return [tensor.detach().clone() for tensor in parameters(self.policy.chunks)]


def start():
    from oreal_megatron.config import ParallelConfig
    from oreal_megatron.mcore import parallel

    parallel.start_process_group()
    parallel.start_megatron(ParallelConfig(), seed=0)


def stop():
    from oreal_megatron.mcore import parallel

    parallel.stop()


def by_hand(folder: str, terms: str, samples: list) -> dict[str, tuple]:
    """For each loss and number of passes: metrics and weights of mini-batches, and of as many single updates."""
    start()
    results = {}
    for name, loss, passes in (("term", OLD, 1), ("two passes", OLD, 2), ("built-in", BUILT_IN, 1)):
        case = Case(folder, terms, loss, updates=2 * passes, mini_batches=2)
        single = Case(folder, terms, GIVEN if loss is OLD else loss)
        parts = [single.with_own_logprobs(samples[part]) for part in PARTS]
        metrics = case.update([sample for part in parts for sample in part])
        steps = [single.update(part) for part in parts * passes]
        results[name] = (metrics, case.weights(), steps, single.weights())
    stop()
    return results


def test_mini_batches_are_the_updates_by_hand(tied_model_folder, in_processes, make_samples, tmp_path):
    (tmp_path / "terms.py").write_text(TERMS)
    samples = make_samples(3, seed=2)[:5]
    tokens = [sum(len(sample.response_tokens) for sample in samples[part]) for part in PARTS]
    results = in_processes(1, by_hand, str(tied_model_folder), f"{tmp_path}/terms.py", samples)[0]
    for name, (metrics, weights, steps, weights_by_hand) in results.items():
        assert all(map(torch.equal, weights, weights_by_hand)), name
        assert metrics["policy/updates"] == len(steps) == (4 if name == "two passes" else 2)
        for key in ("policy/updates", "policy/largest_weight", "policy/learning_rate"):
            assert metrics[key] == steps[-1][key], (name, key)
        for key in metrics.keys() & {"own/moved", "loss/total", "policy/gradient_norm"}:
            assert metrics[key] == pytest.approx(sum(row[key] for row in steps[-2:]) / 2, rel=1e-12), (name, key)
        weighted = sum(row["loss/kl"] * size for row, size in zip(steps[-2:], tokens, strict=True)) / sum(tokens)
        assert metrics["loss/kl"] == pytest.approx(weighted, rel=1e-12), (name, "by tokens")
        if name == "built-in":
            assert steps[0]["policy/ratio_mean"] == metrics["policy/ratio_mean"] == pytest.approx(1)
            assert "policy/ratio_mean" not in steps[1], "its only sample is correct"
        else:
            assert metrics["own/moved"] > 1e-4, "the second mini-batch is not of the policy any more"


def skipped(folder: str, terms: str, samples: list) -> tuple:
    """A mini-batch that is not a number ends the step; the update before it stays."""
    start()
    bad = [dataclasses.replace(sample, advantage=math.nan) for sample in samples[2:4]]
    case, single = Case(folder, terms, OLD, 6, 3), Case(folder, terms, OLD)
    metrics = case.update([*samples[:2], *bad, *samples[4:]])
    single.update(samples[:2])
    stop()
    return metrics, case.weights(), single.weights()


def test_a_skipped_update_ends_the_step(tied_model_folder, in_processes, make_samples, tmp_path):
    (tmp_path / "terms.py").write_text(TERMS)
    arguments = (str(tied_model_folder), f"{tmp_path}/terms.py", make_samples(3, seed=2))
    metrics, weights, first_update = in_processes(1, skipped, *arguments)[0]
    assert (metrics["policy/updates"], metrics["policy/skipped"], metrics["policy/consecutive_skips"]) == (1, 1, 1)
    assert math.isnan(metrics["policy/gradient_norm"]), "the reason is in the metrics"
    assert all(map(torch.equal, weights, first_update))


def share(folder: str, terms: str, samples: list) -> tuple:
    start()
    case = Case(folder, terms, OLD, updates=2, mini_batches=2)
    metrics, batch = case.update(samples), case.batch(samples)
    stop()
    return metrics, case.weights(), [sum(len(part.labels) for part in own.micro_batches) for _, own in batch.split()]


def test_two_replicas_update_as_one_also_where_a_share_is_empty(
    tied_model_folder, in_processes, make_samples, tmp_path
):
    (tmp_path / "terms.py").write_text(TERMS)
    arguments = (str(tied_model_folder), f"{tmp_path}/terms.py", make_samples(3, seed=2)[:5])
    (alone, weights, _), *ranks = (*in_processes(1, share, *arguments), *in_processes(2, share, *arguments))
    assert sorted(tokens[1] > 0 for *_, tokens in ranks) == [False, True], "one replica has no token of the last part"
    for metrics, own, _ in ranks:
        assert metrics == pytest.approx(alone, rel=1e-4, abs=1e-6)
        gaps = [(a - b).square().mean().sqrt().item() for a, b in zip(own, weights, strict=True)]
        assert max(gaps) < 0.02 * 1e-3, "in learning rates; Adam turns rounding of gradients near zero into steps"
