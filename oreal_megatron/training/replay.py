"""Replay of a dumped step: compute it again from the checkpoint before it, and compare the metrics."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from oreal_megatron.mcore import checkpoint_state, gpt_model, parallel
from oreal_megatron.observe.dumps import Dump, DumpShare, read_dump
from oreal_megatron.observe.metric_comparison import MetricPair, compare_metrics
from oreal_megatron.protocols import Metrics, PolicyTrainer, RewardModelTrainer, Scorer, TokenValues
from oreal_megatron.runtime import checkpoint_folders, distributed
from oreal_megatron.session.inputs import read_inputs
from oreal_megatron.session.models import build_models, saved_names
from oreal_megatron.session.session import Session


@dataclass(frozen=True)
class Replay:
    """Result of a replay."""

    source: str  # checkpoint or model it started from
    steps: list[int]  # steps that were computed, the dumped one last
    pairs: list[MetricPair]


def replay_step(dump: Dump, run: str | None, tolerance: float) -> Replay:
    """Compute a dumped step again. `run`: folder with the checkpoints, if it has been moved. Collective."""
    config = dataclasses.replace(dump.config, run=run or dump.config.run)
    inputs = read_inputs(config)
    names = saved_names(config)
    folder = Path(config.run) / "checkpoints"
    first_step = _last_checkpoint_step(folder, dump.step)
    dumps = _dumps_from(dump, first_step or 0)
    with Session(config) as session:
        checkpoint = None
        if first_step is not None:
            checkpoint = checkpoint_state.choose(folder, names, first_step, skip_damaged=False)
        session.start_megatron()
        spec = parallel.packing_spec(config.tokens_per_micro_batch)
        shares = [step_dump.share(spec.rank, spec.ranks) for step_dump in dumps]  # refuses damaged files
        policy, reference, reward_model, saved_models = build_models(inputs)
        if checkpoint:
            checkpoint_state.load(checkpoint, saved_models)
        metrics: Metrics = {}
        for step_dump, share in zip(dumps, shares, strict=True):
            metrics = _compute_step(step_dump, share.to(gpt_model.device()), policy, reference, reward_model)
    source = str(checkpoint) if checkpoint else f"the starting model {config.model.path}"
    return Replay(source, [step.step for step in dumps], compare_metrics(dump.metrics, metrics, tolerance))


def _last_checkpoint_step(folder: Path, last_step: int) -> int | None:
    """Return the step of the newest checkpoint up to a step; None if there is none."""
    steps = map(checkpoint_folders.step_of, checkpoint_folders.complete(folder))
    return max((step for step in steps if step <= last_step), default=None)


def _dumps_from(dump: Dump, first_step: int) -> list[Dump]:
    """Return the dumped steps from `first_step` up to this one. A step without samples has no dump."""
    earlier = [dump.path.with_name(checkpoint_folders.name(step)) for step in range(first_step, dump.step)]
    return [*(read_dump(path) for path in earlier if path.is_dir()), dump]


def _compute_step(
    dump: Dump, share: DumpShare, policy: PolicyTrainer, reference: Scorer, reward_model: RewardModelTrainer
) -> Metrics:
    """Return the metrics of the step, in which the policy gets the dumped inputs.

    `given/token_weights` and `given/reference_logp` tell how far these inputs are from the ones computed now.
    """
    token_weights, metrics = reward_model.update(share.batch)
    gaps = {"given/token_weights": _largest_gap(share.token_weights.values, token_weights.values)}
    if "policy/skipped" in dump.metrics:
        gaps["given/reference_logp"] = _largest_gap(share.reference_logp, reference.score(share.batch))
        metrics |= policy.update(share.batch, share.reference_logp, share.token_weights)
    return metrics | {name: max(distributed.all_gather_object(gap)) for name, gap in gaps.items()}


def _largest_gap(dumped: TokenValues | None, computed: TokenValues | None) -> float:
    """Return the largest difference, inf if only one is a number; 0 on ranks without such values."""
    if not dumped or not computed:
        return 0.0
    old, new = torch.cat(dumped), torch.cat(computed)
    gap = torch.where(old.isnan() & new.isnan(), 0.0, (old - new).abs())
    return float(torch.cat([gap.new_zeros(1), gap]).nan_to_num(nan=math.inf, posinf=math.inf).max())
