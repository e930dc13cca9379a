"""Start of a run in a run folder: new, continued from its newest checkpoint, or taken back to an earlier one.

What a resumed run may change is declared at each key of the configuration (config/schema.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from oreal_megatron import settings
from oreal_megatron.config import Config, ConfigError
from oreal_megatron.config.changes import changes, refuse_fixed
from oreal_megatron.config.schema import config_keys
from oreal_megatron.observe import branches, run_folder
from oreal_megatron.runtime import checkpoint_folders, distributed, files

log = logging.getLogger(__name__)
AUTO = "auto"  # resume where there is a sound checkpoint, else begin


@dataclass(frozen=True)
class Start:
    """Request to start a run; `resume` and `step` as on the command line."""

    config: Config
    steps: int  # of the entire run
    resume: str | None
    step: int | None
    fingerprints: Mapping[str, str]  # digests of the inputs (session/inputs.py)
    unread: tuple[str, ...] = ()  # sections that the command does not read, each with its dot

    @property
    def run(self) -> Path:
        """Run folder."""
        return Path(self.config.run)

    def check(self) -> str:
        """Raise ConfigError for a start that the run folder does not allow; return what is different from before."""
        if not self.resume:
            run_folder.refuse_existing(self.config)
            return ""
        run_folder.check_logs(self.run)
        checkpoint = self._checkpoint()
        if checkpoint is None:
            return self._check_begin()
        first_step = checkpoint_folders.step_of(checkpoint)
        before = settings.from_dict(files.read_object(run_folder.header_before(self.run, first_step)))
        differing = [change for change in changes(before, self.config) if not change.path.startswith(self.unread)]
        refuse_fixed(self.config.run, differing)
        new_contents = self._check_inputs(first_step, before)
        if self.steps < first_step:
            raise ConfigError(
                f"the run is of {self.steps} steps, but {self.run} continues after step {first_step}; set more steps, "
                f"or go back with --resume {self.run} --step N"
            )
        announced = [str(change) for change in differing if change.on_resume == "announced"] + new_contents
        listed = ", ".join(announced)
        return f"{self.run} continues after step {first_step} with other settings: {listed}" if listed else ""

    def check_and_announce(self) -> None:
        """Check as above, and log what is different from before."""
        if notice := self.check():
            log.info(notice)

    def set_aside_later_steps(self, step: int) -> None:
        """Set aside what the run wrote after the step it continues from, and say so. The first rank does it."""
        if distributed.rank() or not self.resume:
            return
        steps = run_folder.logged_steps(self.run)
        if branch := branches.set_aside(self.run, step):
            log.info(
                f"{self.run} goes back to step {step}; what it wrote after that is set aside in {branch}, a run folder "
                "of its own"
            )
        elif step and steps > step:
            log.info(
                f"{self.run} continues from step {step}; of {steps} logged steps those after it were not saved and are "
                "taken again"
            )

    def _checkpoint(self) -> Path | None:
        """Return the checkpoint that is asked for, or the newest; None if there is none."""
        folder = self.run / "checkpoints"
        if self.step is None:
            return next(iter(checkpoint_folders.candidates(folder)), None)
        present = {checkpoint_folders.step_of(path): path for path in checkpoint_folders.complete(folder)}
        if self.step not in present:
            listed = ", ".join(map(str, present)) or "none"
            raise ConfigError(
                f"{self.run} has no checkpoint after {self.step} steps; choose --step from those it has: {listed}"
            )
        return present[self.step]

    def _check_begin(self) -> str:
        """Check a start without a checkpoint: only --resume auto begins, and not over a finished model."""
        run = self.run
        if self.resume != AUTO:
            raise ConfigError(f"{run} has no finished checkpoint to resume from; start the run with its recipe")
        if models := [name for name in ("policy", "reward_model") if (run / name).is_dir()]:
            raise ConfigError(
                f"{run} holds a finished {models[0]} and no checkpoint, so --resume auto would begin again and replace "
                "it; choose another run folder with --set run=FOLDER"
            )
        steps = run_folder.logged_steps(run)
        return f"{run} has no checkpoint; the run begins again, and its {steps} steps are taken again" if steps else ""

    def _check_inputs(self, step: int, before: Config) -> list[str]:
        """Raise ConfigError if inputs that are fixed for a run have other contents; return which others have.

        The starting policy is the reference of the run, the order of the prompts depends on the data, and accuracies
        on other problems cannot be compared. Run folders of 0.1.0 name digests by path.
        """
        recorded = files.read_object(run_folder.header_before(self.run, step, "environment")).get("inputs", {})
        former_names = {"model.path": f"model {before.model.path}", "data.path": f"data {before.data.path}"}
        classes = {key.path: key.on_resume for key in config_keys(self.config)}
        differing = []
        for name, digest in self.fingerprints.items():
            if recorded.get(name, recorded.get(former_names.get(name, ""), digest)) == digest:
                continue
            if classes.get(name) == "announced":
                differing.append(f"contents of {name}")
                continue
            raise ConfigError(
                f"{name} has other contents than when {self.run} was started, which are fixed for an entire run; "
                "restore them to resume it, or start a new run with --set run=FOLDER"
            )
        return differing
