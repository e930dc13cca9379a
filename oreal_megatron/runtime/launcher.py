"""Start a command in several processes on one node or on several: torchrun with the command's own exit code.

torchrun itself returns 1 for every failure, prints a stack trace of its own, and restarts also where that cannot help.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher import api
from torch.distributed.run import parse_args, run

from oreal_megatron.config import ConfigError
from oreal_megatron.runtime import files, preemption
from oreal_megatron.runtime.exit_codes import FINAL, LOST, PREEMPTED

SAVE_S = 600  # time for processes to save after a stop request; then they are killed


class Agent(LocalElasticAgent):
    """torchrun's supervisor of one node's processes; restarts them only where that may help."""

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode in FINAL for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


def launch(args: argparse.Namespace, arguments: list[str]) -> int:
    """Run `oreal ARGUMENTS` in `args.processes` processes of this node; return the exit code of the first to fail.

    A killed process counts as lost, and so does a failed rendezvous. Raises ConfigError for nodes that could not meet,
    and for a folder of logs that cannot be written.
    """
    if args.nodes > 1 and not args.rendezvous:
        raise ConfigError(
            f"--nodes {args.nodes} needs --rendezvous HOST:PORT, the same on every node: one of the nodes, and a free "
            "port of it"
        )
    if args.rendezvous:
        _check_address(args.rendezvous)
    if args.logs:
        files.make_folder(Path(args.logs), "--logs")
    setattr(api, "LocalElasticAgent", Agent)  # noqa: B010 - torch offers no other way to choose the agent
    _silence_torchrun()
    if args.rendezvous:  # else torch 2.13 keeps its store, where ranks find the addresses of those before a restart
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_S))
    with tempfile.TemporaryDirectory(prefix="oreal_") as folder:  # torchrun would leave one of its own behind
        return _run([*torchrun(args, folder), "-m", "oreal_megatron", *arguments], args)


def _check_address(address: str) -> None:
    """Raise ConfigError for a text that torch does not read as HOST:PORT."""
    try:
        parse_rendezvous_endpoint(address, default_port=0)
    except ValueError as error:
        raise ConfigError(
            f"--rendezvous is {address!r} ({error}); expected HOST:PORT, such as node-1:29400, the same on every node"
        ) from None


def _silence_torchrun() -> None:
    """Drop torchrun's own warnings and errors: `_exit_code_of` says the same in one line."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _run(words: list[str], args: argparse.Namespace) -> int:
    try:
        run(parse_args(words))
    except ChildFailedError as error:
        return _exit_code_of(*error.get_first_failure(), args.logs)
    except SignalException as stop:  # passed on to the processes, which have ended by now
        saves = args.command == "train" and stop.sigval in preemption.SIGNALS
        return PREEMPTED if saves else 128 + stop.sigval
    except (RendezvousError, DistError) as error:
        print(f"oreal: the nodes did not meet at {args.rendezvous}, or lost each other: {error}", file=sys.stderr)
        return LOST
    return 0


def torchrun(args: argparse.Namespace, folder: str) -> list[str]:
    """Return torchrun's arguments; `folder` holds its files. It reads all others from its own PET_... variables."""
    words = ["--nproc-per-node", str(args.processes), "--max-restarts", str(args.max_restarts)]
    words += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    if args.rendezvous:
        words += ["--nnodes", str(args.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", args.rendezvous]
    else:
        words += ["--standalone", "--local-addr", "127.0.0.1"]  # the machine's own name may not resolve
    if args.logs:  # every process writes its own file; that of the node's first one is shown as well
        return [*words, "--log-dir", args.logs, "--redirects", "3", "--tee", "0:3"]
    return [*words, "--log-dir", folder]


def _exit_code_of(rank: int, failure: Any, logs: str | None) -> int:
    """Return the exit code of a failed process; print its rank unless the process has explained itself."""
    if failure.exitcode in (*FINAL, LOST):
        return failure.exitcode
    killed = failure.exitcode < 0
    how = f"was ended by {signal.Signals(-failure.exitcode).name}" if killed else f"failed with {failure.exitcode}"
    where = f"; its output is in {failure.error_file.removesuffix('error.json')}" if logs else ""
    print(f"oreal: rank {rank} {how}{where}", file=sys.stderr, flush=True)
    return LOST if killed else failure.exitcode
