"""Arguments of the commands that begin or continue a run folder, and the configuration that they name."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from oreal_megatron import settings
from oreal_megatron.config import Config, ConfigError
from oreal_megatron.observe.run_folder import refuse_existing
from oreal_megatron.runtime import files

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """Declare recipe, resume and changes of settings."""
    parser.add_argument(
        "recipe", nargs="?", help="FILE.py:FUNCTION, which returns a Config; FILE.py alone if it holds one"
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="continue this run folder from its newest checkpoint; with a recipe, `auto`: continue the recipe's run "
        "folder from its newest sound checkpoint, or begin where there is none",
    )
    parser.add_argument("--step", type=int, metavar="N", help="resume from the checkpoint after N steps instead")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"e.g. {example}")


def load_config(args: argparse.Namespace) -> Config:
    """Return the configuration of a recipe or a run folder. Raises ConfigError for a run that exists already."""
    auto = args.resume == "auto"
    if bool(args.recipe) != (auto or not args.resume):
        raise ConfigError("name a recipe, or --resume RUN, or a recipe and --resume auto")
    if args.step is not None and (auto or not args.resume):
        raise ConfigError("--step needs --resume RUN: it names the checkpoint of that run to continue from")
    if not args.recipe:
        config = settings.from_dict(_config_file(Path(args.resume)))
        return settings.override(config, [f"run={args.resume}", *args.set])
    config = settings.load(args.recipe, args.set)
    if not auto:
        refuse_existing(config)
    elif (Path(config.run) / "config.json").is_file():
        present = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists, as in the file
        former = settings.with_current_names(_config_file(Path(config.run)))
        changes = settings.differences(former, present)
        if changes:
            log.info("%s continues with settings that differ from its start: %s", config.run, ", ".join(changes))
    return config


def _config_file(run: Path) -> dict[str, Any]:
    """Read the configuration of a run folder."""
    file = run / "config.json"
    if not file.is_file():
        raise ConfigError(f"{run} is not a run folder: it has no config.json")
    return files.read_object(file)
