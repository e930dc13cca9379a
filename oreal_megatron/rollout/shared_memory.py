"""vLLM 0.31 on CPUs names the memory that tensor-parallel ranks share by their numbers alone: two jobs on a machine get
in each other's way, and what a killed job left behind refuses the next one."""

from __future__ import annotations

from vllm.distributed.device_communicators import cpu_communicator
from vllm.platforms import current_platform


def of_this_job(token: str) -> None:
    """Have the names begin with a token, equal on all ranks and never used before."""
    if not current_platform.is_cpu():
        return
    shared = cpu_communicator._CPUSHMDistributed
    original = shared.make_group_name
    # No slash but the first may be in such a name; vLLM's begins with those of "env://".
    shared.make_group_name = staticmethod(lambda communicator: f"/{token}{original(communicator).strip('/')}")
