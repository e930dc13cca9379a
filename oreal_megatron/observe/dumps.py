"""What a step was trained on, as files from which `oreal replay` computes it again.

RUN/dumps/step_000013/step.json               step, counts, metrics, configuration
                      share_000.safetensors   micro-batches of data-parallel rank 0, with the reference's log-probs
                                              and the token weights that the policy was given
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from oreal_megatron import settings
from oreal_megatron.algo import guard
from oreal_megatron.config import Config, ConfigError
from oreal_megatron.records import Batch, Counts, MicroBatch, TokenWeights
from oreal_megatron.runtime import files

PER_TOKEN = ("reference_logp", "weight")  # names in the file of the policy step's inputs beside the batch, [T] each
Values = list[Tensor] | None


def write(
    path: Path,
    step: int,
    share: tuple[int, int],  # this data-parallel rank, and how many there are
    batch: Batch,
    reference_logp: Values,
    token_weights: TokenWeights,
    metrics: dict[str, float],
    config: Config,
) -> None:
    """Write one data-parallel rank's share of a step; the first rank also writes what all have in common.

    Inputs that the policy's step did not get are left out: reference log-probs while it is frozen, invalid weights.
    """
    tensors, (rank, shares) = {}, share
    for number, micro_batch in enumerate(batch.micro_batches):
        held = {field.name: getattr(micro_batch, field.name) for field in dataclasses.fields(micro_batch)}
        held["sequence_offsets"] = torch.tensor(micro_batch.sequence_offsets)
        given = zip(PER_TOKEN, (reference_logp, token_weights.values), strict=True)
        held |= {name: values[number] for name, values in given if values}
        tensors |= {f"{number}/{name}": value.detach().to("cpu", copy=True) for name, value in held.items()}
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, _share(path, rank))
    if rank == 0:
        common = {"step": step, "shares": shares, "counts": dataclasses.asdict(batch.counts), "metrics": metrics}
        (path / "step.json").write_text(json.dumps(common | {"config": dataclasses.asdict(config)}, indent=2) + "\n")


@dataclass(frozen=True)
class Share:
    """Training inputs of one data-parallel rank."""

    batch: Batch
    reference_logp: Values  # None: the policy was frozen
    token_weights: TokenWeights

    def to(self, device: torch.device) -> Share:
        """Return this share with its values on the device; micro-batches go there one at a time."""
        reference_logp = [value.to(device) for value in self.reference_logp] if self.reference_logp else None
        weights = [value.to(device) for value in self.token_weights.values]
        return Share(self.batch, reference_logp, TokenWeights(weights, self.token_weights.valid))


@dataclass(frozen=True)
class Dump:
    """One dumped step; its tensors are read when asked for."""

    path: Path
    step: int
    shares: int  # data-parallel ranks that it was cut for
    counts: Counts
    metrics: dict[str, float]
    config: Config

    def share(self, rank: int, ranks: int) -> Share:
        """Of data-parallel rank `rank` of `ranks`. Where these are fewer than there were, each takes several shares:
        all have equally many micro-batches."""
        if self.shares % ranks:
            raise ConfigError(
                f"{self.path} is cut for {self.shares} data-parallel ranks, which {ranks} cannot share evenly"
            )
        parts = [part for share in range(rank, self.shares, ranks) for part in self._parts(share)]
        batch = Batch(tuple(_micro_batch(part) for part in parts), self.counts)
        reference_logp, weights = ([part[name] for part in parts if name in part] for name in PER_TOKEN)
        return Share(batch, reference_logp or None, TokenWeights(weights, valid=bool(weights)))

    def _parts(self, share: int) -> list[dict[str, Tensor]]:
        file = _share(self.path, share)
        try:
            parts: dict[int, dict[str, Tensor]] = {}
            for name, value in load_file(file).items():
                number, _, field = name.partition("/")
                parts.setdefault(int(number), {})[field] = value
            return [parts[number] for number in range(len(parts))]
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ConfigError(f"{file} is missing, damaged or not a step's: {error}") from None


def read(path: Path) -> Dump:
    """A dumped step, its tensors still on disk."""
    try:
        whole = files.read_object(path / "step.json")
        counts, config = Counts(**whole["counts"]), settings.from_dict(whole["config"])
        return Dump(path, whole["step"], whole["shares"], counts, whole["metrics"], config)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the dump of a step, such as RUN/dumps/step_000013: {error}") from None


def forget(run: Path, gone: Callable[[str], bool]) -> None:
    """Delete the dumps of steps that are gone by their name, but not of skipped ones."""
    for path in (run / "dumps").glob("step_*"):
        if gone(path.name) and not _is_skipped(path):
            shutil.rmtree(path)


def _is_skipped(path: Path) -> bool:
    try:
        return bool(guard.skipped_models(read(path).metrics))
    except ConfigError:  # a crash cut it off
        return False


def _share(path: Path, share: int) -> Path:
    return path / f"share_{share:03d}.safetensors"


def _micro_batch(part: dict[str, Any]) -> MicroBatch:
    fields = {field.name: part[field.name] for field in dataclasses.fields(MicroBatch)}
    return MicroBatch(**fields | {"sequence_offsets": tuple(part["sequence_offsets"].tolist())})
