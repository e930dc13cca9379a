"""Dumps of what a step was trained on, from which `oreal replay` computes the step again.

RUN/dumps/step_000013/step.json               step, counts, metrics, configuration
                      share_000.safetensors   micro-batches of data-parallel rank 0, with the reference's log-probs
                                              and the token weights that the policy was given

A share holds one tensor `M/FIELD` per micro-batch M and field of records.MicroBatch, `M/reference_logp` [T] and
`M/weight` [T] if the policy was given them, and `M/score` [T], the reward model's scores that the weights are made of.
Dumps of `oreal sft` and `oreal distill` have demonstrations, and `M/logp` [T], the policy's log-probs before the step.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from oreal_megatron import settings
from oreal_megatron.algo import guard
from oreal_megatron.config import Config, ConfigError
from oreal_megatron.protocols import Metrics, TokenValues
from oreal_megatron.records import Batch, Counts, MicroBatch, MiniBatch, TokenWeights, consecutive
from oreal_megatron.runtime import checkpoint_folders, files

log = logging.getLogger(__name__)
LISTED = 20  # names of dumps in a message
PER_TOKEN = ("reference_logp", "weight", "score", "logp")  # names in the file of the values beside the batch, [T] each


class StepDumps:
    """Writer of the dumps of a run. `share`: (data-parallel rank, ranks) to dump; None if this rank dumps nothing."""

    def __init__(self, config: Config, share: tuple[int, int] | None):
        self.config, self.share, self.run = config, share, Path(config.run)

    def folder_of(self, step: int) -> Path:
        """Return the folder of a step's dump."""
        return self.run / "dumps" / checkpoint_folders.name(step)

    def write(
        self,
        step: int,
        batch: Batch,
        reference_logp: TokenValues | None,
        token_weights: TokenWeights,
        metrics: Metrics,
        demonstrated_logp: TokenValues | None = None,
    ) -> None:
        """Dump this rank's share of a step. A dump that cannot be written is reported, and the run continues."""
        if not self.share:
            return
        inputs = batch, reference_logp, token_weights, metrics
        try:
            write_dump(self.folder_of(step), step, self.share, *inputs, self.config, demonstrated_logp)
        except (OSError, SafetensorError) as error:  # for example a full disk
            log.warning("step %d could not be dumped for oreal replay: %s", step, error)

    def delete_from(self, step: int) -> None:
        """Delete the dumps of `step` and later ones, which are run again."""
        delete_dumps(self.run, lambda name: name >= checkpoint_folders.name(step))

    def delete_before(self, checkpoints: Sequence[Path]) -> None:
        """Delete the dumps of steps before the oldest of these checkpoints: nothing is left to replay them from."""
        if checkpoints:
            delete_dumps(self.run, lambda name: name < checkpoints[0].name)

    def delete_old(self, steps_done: int) -> None:
        """Delete all but the newest `record.dumps` steps, and as many skipped ones before them."""
        limit = self.config.record.dumps
        oldest = checkpoint_folders.name(max(steps_done - limit, 0))
        delete_dumps(self.run, lambda name: name < oldest)
        for path in sorted(path for path in (self.run / "dumps").glob("step_*") if path.name < oldest)[:-limit]:
            shutil.rmtree(path)


@dataclass(frozen=True)
class DumpShare:
    """Training inputs of one data-parallel rank."""

    batch: Batch
    reference_logp: TokenValues | None  # None: the policy was frozen
    token_weights: TokenWeights
    demonstrated_logp: TokenValues = dataclasses.field(default_factory=list)

    def to(self, device: torch.device) -> DumpShare:
        """Return the share with its values per token on the device; micro-batches move there one at a time."""
        reference_logp = [value.to(device) for value in self.reference_logp] if self.reference_logp else None
        weights = dataclasses.replace(
            self.token_weights, values=[value.to(device) for value in self.token_weights.values]
        )
        return DumpShare(self.batch, reference_logp, weights, self.demonstrated_logp)


@dataclass(frozen=True)
class Dump:
    """One dumped step. Its tensors stay on disk until `share` reads them."""

    path: Path
    step: int
    shares: int  # data-parallel ranks of the run that wrote it
    counts: Counts
    metrics: Metrics
    config: Config
    of_demonstrations: bool = False  # of `oreal sft` or `oreal distill`
    mini_batches: tuple[MiniBatch, ...] = ()  # as Batch has them

    def share(self, rank: int, ranks: int) -> DumpShare:
        """Return what data-parallel rank `rank` of `ranks` trains on.

        Fewer ranks than the run had take several shares each; all shares have equally many micro-batches.
        """
        if self.shares % ranks:
            raise ConfigError(
                f"{self.path} was dumped by {self.shares} data-parallel ranks, which {ranks} cannot share evenly"
            )
        read = [self._read_parts(share) for share in range(rank, self.shares, ranks)]
        sizes = [part.micro_batches for part in self.mini_batches] or [len(read[0])]
        parts = [part for own in consecutive(sizes) for share in read for part in share[own]]
        joined = [dataclasses.replace(part, micro_batches=part.micro_batches * len(read)) for part in self.mini_batches]
        batch = Batch(tuple(_micro_batch(part) for part in parts), self.counts, tuple(joined))
        reference_logp, weights, scores, logp = ([part[name] for part in parts if name in part] for name in PER_TOKEN)
        return DumpShare(batch, reference_logp or None, TokenWeights(weights, bool(weights), scores), logp)

    def _read_parts(self, share: int) -> list[dict[str, Tensor]]:
        """Read the tensors of each micro-batch of a share."""
        file = _share_file(self.path, share)
        try:
            parts: dict[int, dict[str, Tensor]] = {}
            for name, value in load_file(file).items():
                number, _, field = name.partition("/")
                parts.setdefault(int(number), {})[field] = value
            return [parts[number] for number in range(len(parts))]
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ConfigError(f"{file} is missing, damaged or not part of a dump: {error}") from None


def write_dump(
    folder: Path,
    step: int,
    share: tuple[int, int],  # this data-parallel rank, and how many there are
    batch: Batch,
    reference_logp: TokenValues | None,
    token_weights: TokenWeights,
    metrics: Metrics,
    config: Config,
    demonstrated_logp: TokenValues | None = None,
) -> None:
    """Write one data-parallel rank's share of a step; the first rank also writes step.json.

    Inputs that the policy's step did not get are left out: reference log-probs while it is frozen, invalid weights.
    `demonstrated_logp`: the policy's log-probs before a supervised step; None in reinforcement learning.
    """
    tensors: dict[str, Tensor] = {}
    rank, shares = share
    for number, micro_batch in enumerate(batch.micro_batches):
        fields = {field.name: getattr(micro_batch, field.name) for field in dataclasses.fields(micro_batch)}
        fields["sequence_offsets"] = torch.tensor(micro_batch.sequence_offsets)
        values_of = (reference_logp, token_weights.values, token_weights.scores, demonstrated_logp)
        per_token = zip(PER_TOKEN, values_of, strict=True)
        fields |= {name: values[number] for name, values in per_token if values}
        tensors |= {f"{number}/{name}": value.detach().to("cpu", copy=True) for name, value in fields.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, _share_file(folder, rank))
    if rank == 0:
        header = {"step": step, "shares": shares, "counts": dataclasses.asdict(batch.counts), "metrics": metrics}
        header["mini_batches"] = [dataclasses.asdict(part) for part in batch.mini_batches]
        header |= {"demonstrations": demonstrated_logp is not None, "config": dataclasses.asdict(config)}
        (folder / "step.json").write_text(json.dumps(header, indent=2) + "\n")


def read_dump(folder: Path) -> Dump:
    """Read the header of a dumped step."""
    if not (folder / "step.json").is_file():
        raise ConfigError(_describe_missing(folder))
    try:
        header = files.read_object(folder / "step.json")
        counts, config = Counts(**header["counts"]), settings.from_dict(header["config"])
        demonstrations, parts = header.get("demonstrations", False), header.get("mini_batches", ())  # new in 0.2
        return Dump(
            folder,
            header["step"],
            header["shares"],
            counts,
            header["metrics"],
            config,
            demonstrations,
            tuple(MiniBatch(part["micro_batches"], Counts(**part["counts"])) for part in parts),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} is not the dump of a step, such as RUN/dumps/step_000013: {error}") from None


def _describe_missing(folder: Path) -> str:
    """Return a message about a folder that is no dump, with the dumps in it or beside it."""
    for parent in (folder / "dumps", folder, folder.parent):
        names = sorted(file.parent.name for file in parent.glob("step_*/step.json"))
        if names:
            shown = ", ".join(names if len(names) <= LISTED else [*names[: LISTED - 1], "...", names[-1]])
            return f"{folder} is not the dump of a step; name one of those in {parent}: {shown}"
    return (
        f"{folder} is not the dump of a step, such as RUN/dumps/step_000013, and none is near it; a run has dumps with "
        "record.dumps above 0"
    )


def read_replayable(folder: Path) -> Dump:
    """Read the header of a dumped step of reinforcement learning; raise ConfigError for one of demonstrations."""
    dump = read_dump(folder)
    if dump.of_demonstrations:
        raise ConfigError(
            f"{folder} is a step of `oreal sft` or `oreal distill`, which `oreal replay` does not compute; look at it "
            "with `oreal report RUN --html FILE`, or take the step again with --resume and --step"
        )
    return dump


def delete_dumps(run: Path, is_obsolete: Callable[[str], bool]) -> None:
    """Delete the dumps whose name is obsolete, except those of skipped steps."""
    for path in (run / "dumps").glob("step_*"):
        if is_obsolete(path.name) and not _is_skipped(path):
            shutil.rmtree(path)


def _is_skipped(path: Path) -> bool:
    try:
        return bool(guard.skipped_models(read_dump(path).metrics))
    except ConfigError:  # incomplete after a crash
        return False


def _share_file(folder: Path, share: int) -> Path:
    return folder / f"share_{share:03d}.safetensors"


def _micro_batch(part: dict[str, Tensor]) -> MicroBatch:
    if "rollouts" not in part:  # dumps of version 0.1
        part = part | {"rollouts": torch.full((len(part["reward"]), 2), -1)}
    if "carried" not in part:  # dumps before partial rollouts
        part = part | {"carried": torch.zeros(len(part["labels"]), dtype=torch.bool)}
    fields = {field.name: part[field.name] for field in dataclasses.fields(MicroBatch)}
    return MicroBatch(**fields | {"sequence_offsets": tuple(part["sequence_offsets"].tolist())})  # type: ignore[arg-type]
