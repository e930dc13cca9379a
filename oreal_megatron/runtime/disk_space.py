"""Waiting for disk space on all ranks together."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from oreal_megatron.runtime import distributed, files, heartbeat

log = logging.getLogger(__name__)


def wait_for_room(folder: Path, needed: int, purpose: str) -> None:
    """Wait until the first rank sees `needed` free bytes. Every check is a collective, so that none times out.

    The wait is logged once. `folder` must exist on the first rank.
    """
    reported = False
    while (free := distributed.all_gather_object(_free_bytes(folder))[0]) < needed:
        if distributed.rank() == 0 and not reported:
            log.warning(
                f"{purpose} needs {needed / 2**20:.1f} MiB, but {folder} has {free / 2**20:.1f} MiB free; waiting "
                "until there is space, nothing is lost"
            )
        reported = True
        heartbeat.beat()
        time.sleep(files.RETRY_S)
    if distributed.rank() == 0 and reported:
        log.warning(f"there is space in {folder} again; continuing")


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free if distributed.rank() == 0 else 0
