"""Logging of every command: one format, one rank filter, and the filters of what other libraries say.

Modules log with `logging.getLogger(__name__)`. INFO is shown by the first rank only; warnings and errors by every rank,
with its number. What a command returns to its user (tables, results) is printed to stdout and is not logged.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

# Environment variables that libraries read while they are imported, so they are set before any of them is.
ENVIRONMENT = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # announces NUMA binding on every rank
    "TRANSFORMERS_VERBOSITY": "error",  # tokenizers' clean-up options, deprecated keys of old config.json files
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",  # torchrun sets the same value and prints a box about it
}

# Logger -> level below which it says nothing that a user could act on.
LEVELS = {
    "vllm": logging.ERROR,  # warns before it reads its own VLLM_LOGGING_LEVEL
    "megatron.core.rerun_state_machine": logging.ERROR,  # announces that it does nothing
    "megatron.core.tensor_parallel.random": logging.ERROR,  # warns of random states that a rehearsal does not have
}


class RankFilter(logging.Filter):
    """Pass INFO on the first rank only; name the rank in the messages of the others."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is shown on this rank."""
        rank = int(os.environ.get("RANK", 0))
        record.rank = f" (rank {rank})" if rank else ""
        return rank == 0 or record.levelno >= logging.WARNING


def quiet_environment() -> None:
    """Set the variables of ENVIRONMENT that the user has not set. Call before torch is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def set_up() -> None:
    """Send the package's messages to stderr as `oreal: message`. Safe to call again."""
    if not sys.warnoptions:  # Megatron, vLLM and torch warn at every import; `python -W default` shows them
        warnings.simplefilter("ignore")
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)
    # Its memory-efficient sharding gives ranks different states, of which Megatron warns.
    validation = logging.getLogger("megatron.core.dist_checkpointing.validation")
    validation.filters = [_is_not_about_sharding]
    package = logging.getLogger("oreal_megatron")
    package.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.addFilter(RankFilter())
    handler.setFormatter(logging.Formatter("oreal%(rank)s: %(message)s"))
    package.handlers = [handler]


def _is_not_about_sharding(record: logging.LogRecord) -> bool:
    return "('optimizer', 'param_state')" not in record.getMessage()
