"""The record of a training run: progress bar, phase times, metrics, rollouts and dumps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path

from oreal_megatron.algo import guard, reward_diagnostics
from oreal_megatron.config import Config
from oreal_megatron.config.user_functions import Origin
from oreal_megatron.models.architecture import Architecture
from oreal_megatron.observe.dumps import StepDumps
from oreal_megatron.observe.idle_steps import IdleSteps
from oreal_megatron.observe.metrics_log import MetricsLog
from oreal_megatron.observe.phase_timer import PhaseTimer
from oreal_megatron.observe.progress import Bar, step_note
from oreal_megatron.observe.run_folder import NO_ORIGIN, RunFolder
from oreal_megatron.observe.spans import PhaseSpans
from oreal_megatron.observe.trackers import Trackers
from oreal_megatron.observe.user_hooks import UserHooks
from oreal_megatron.observe.weight_balance import WeightBalance
from oreal_megatron.protocols import Metrics, TokenValues
from oreal_megatron.records import Batch, Rollout, TokenWeights, Verdict
from oreal_megatron.runtime import distributed, heartbeat, rollout_exchange

NO_WEIGHTS = TokenWeights([], valid=False)  # of demonstrations


class Recorder:
    """Implementation of protocols.RunRecorder.

    The first rank writes metrics, the first one of each engine replica its rollouts; one rank of each data-parallel
    replica dumps its share of the batch; every rank times its phases.
    """

    def __init__(
        self,
        config: Config,
        first_step: int = 0,
        fingerprints: Mapping[str, str] | None = None,
        dump_share: tuple[int, int] | None = (0, 1),  # (data-parallel rank, ranks) to dump; None: this rank dumps none
        arch: Architecture | None = None,  # architecture of the policy, to count operations
        peak_flops: float | None = None,  # operations per second of one GPU, if known
        origin: Origin = NO_ORIGIN,  # command line and recipe
        generation_metrics: Callable[[], Metrics] = dict,  # of the last step's generation
    ):
        self.config, self.first_step, self.generation_metrics = config, first_step, generation_metrics
        self.writes = distributed.rank() == 0
        self.folder = RunFolder(config)
        if self.writes:
            self.folder.write_header(fingerprints or {}, first_step, peak_flops, origin)
        trackers = Trackers(config, first_step) if self.writes else None
        self.metrics = MetricsLog(self.folder.path, first_step, trackers)
        self.timer = PhaseTimer(config, arch, peak_flops)
        self.spans = PhaseSpans(config)
        self.idle_steps = IdleSteps()
        self.dumps = StepDumps(config, dump_share)
        self.weight_balance = WeightBalance()
        self.user_hooks = UserHooks(config.record)
        if self.writes:
            self.folder.delete_rollouts_from(first_step)
            self.dumps.delete_from(first_step)

    @contextlib.contextmanager
    def steps(self) -> Iterator[Iterator[int]]:
        """Iterate over the steps that remain, under a progress bar."""
        with Bar(f"train {self.folder.path.name}", self.config.steps, self.writes, self.first_step) as self.bar:
            self.timer.start()
            with contextlib.closing(self._step_numbers()) as numbers:  # ends the span of a step that failed
                yield numbers
            self._report(self.idle_steps.summary())

    def _step_numbers(self) -> Generator[int, None, None]:
        for step in range(self.first_step, self.config.steps):
            heartbeat.step(step)
            with self.spans.span("step"):
                yield step

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step on this rank. Not collective."""
        with self.spans.span(name), self.timer.phase(name):
            yield

    def dump(
        self,
        step: int,
        batch: Batch,
        reference_logp: TokenValues | None,
        token_weights: TokenWeights,
        metrics: Metrics,
    ) -> None:
        """Write what the step is trained on, and report what is wrong with it. Not collective."""
        if self.dumps.share:
            self.timer.count_work(batch)
            self.dumps.write(step, batch, reference_logp, token_weights, metrics)
        if token_weights.rollouts:
            self.metrics.log_calibration(step, reward_diagnostics.calibration(token_weights.rollouts))
        if models := guard.skipped_models(metrics):
            line = f"{' and '.join(models)} skipped step {step}: {guard.skip_reason(metrics)}; "
            self._report(line + f"inspect it with oreal replay {self.dumps.folder_of(step)}")
        if warning := self.weight_balance.warning(metrics):
            self._report(f"step {step}: {warning}")

    def dump_demonstrations(self, step: int, batch: Batch, logp: TokenValues, metrics: Metrics) -> None:
        """Write the demonstrations of a supervised step with the policy's log-probs before it. Not collective."""
        self.dumps.write(step, batch, None, NO_WEIGHTS, metrics, logp)
        if self.writes:
            self.dumps.delete_old(step + 1)

    def _report(self, line: str) -> None:
        """Print a line above the progress bar, on the first rank; nothing if it is empty."""
        if self.writes and line:
            self.bar.console.print(line, highlight=False)

    def delete_old_dumps(self, checkpoints: Sequence[Path]) -> None:
        """Delete the dumps of steps before the oldest of these checkpoints. Not collective."""
        if self.writes:
            self.dumps.delete_before(checkpoints)

    def log(
        self,
        step: int,
        metrics: Metrics,
        rollouts: Sequence[Sequence[Rollout]],
        verdicts: Sequence[Sequence[Verdict]],
    ) -> None:
        """Write metrics, timings and rollouts of a finished step. Collective."""
        self._write_own_rollouts(step, rollouts, verdicts)  # all ranks have done so when the first one writes metrics
        metrics = metrics | self.timer.finish_step(metrics, rollouts) | self.generation_metrics()
        if self.config.record.metric:
            rollouts = _gather_rows(rollouts)
        if self.writes:
            metrics |= self.user_hooks.metrics(rollouts, verdicts)
            self.folder.delete_rollouts_before(step + 1 - self.config.record.rollouts)
            self.dumps.delete_old(step + 1)
            self.metrics.log_step(step, metrics)
            self.user_hooks.step_done(step, metrics, self.config.run)
            self._report(self.idle_steps.report(metrics))
            self.bar.advance(1, step_note(metrics, self.metrics.last_evaluation(self.config.evaluation.figure)))

    def _write_own_rollouts(
        self, step: int, rollouts: Sequence[Sequence[Rollout]], verdicts: Sequence[Sequence[Verdict]]
    ) -> None:
        """Write the rollouts of this rank's engine replica, on its first rank. Not collective."""
        size = self.config.engine.tensor
        if distributed.rank() % size == 0:
            replica, replicas = distributed.rank() // size, distributed.world_size() // size
            self.folder.write_rollouts(step, rollouts, verdicts, replica, replicas)


def _gather_rows(rollouts: Sequence[Sequence[Rollout]]) -> list[list[Rollout]]:
    """Return [P, K] rollouts, on the first rank with all values. Collective."""
    gathered = iter(rollout_exchange.gather([rollout for row in rollouts for rollout in row]))
    return [[next(gathered) for _ in row] for row in rollouts]
