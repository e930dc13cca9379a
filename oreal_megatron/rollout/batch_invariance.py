"""vLLM's batch-invariant mode: a token's log-prob does not depend on what else is in the batch.

vLLM reads its switch while it is imported, and NCCL its settings when the first communicator is made, so both are set
before. The mode replaces operations of torch in the entire process, which is the trainer's too. In vLLM 0.26 to 0.31
these are, from compute capability 9.0 on, softmax, log_softmax, mean and bmm, and cuBLAS works without split sums;
`torch.bmm` loses its gradient, which the trainer does not call. On 8.x mm, addmm, matmul and linear are replaced as
well: the trainer's linear layers would be without gradient, so the mode is refused there.
"""

from __future__ import annotations

import os

import torch

from oreal_megatron.config import ConfigError, EngineConfig

SWITCH = "VLLM_BATCH_INVARIANT"
CAPABILITY = (9, 0)
# As vLLM's override_envs_for_invariance sets them, which is too late for a process whose communicators exist already.
NCCL_SETTINGS = {
    "NCCL_ALGO": "ring,tree;allreduce:tree",
    "NCCL_PROTO": "Simple",
    "NCCL_MIN_NCHANNELS": "1",
    "NCCL_MAX_NCHANNELS": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_COLLNET_ENABLE": "0",
    "NCCL_LAUNCH_MODE": "GROUP",
}


def prepare(engine: EngineConfig) -> None:
    """Set the environment of the mode, or check that it is off; call it before vLLM is imported and NCCL starts.

    Raises ConfigError where the platform lacks the mode, or where the environment contradicts the setting.
    """
    if not engine.batch_invariant:
        if os.environ.get(SWITCH, "0") not in ("", "0"):
            raise ConfigError(
                f"the environment has {SWITCH}={os.environ[SWITCH]}, but engine.batch_invariant is false; set "
                f"engine.batch_invariant=true, which checks what the mode needs, or unset {SWITCH}"
            )
        return
    _require_platform()
    os.environ[SWITCH] = "1"
    if engine.tensor > 1:  # ranks of a replica add up in one order
        for name, value in NCCL_SETTINGS.items():
            os.environ.setdefault(name, value)


def _require_platform() -> None:
    required = ".".join(map(str, CAPABILITY))
    if not torch.cuda.is_available():
        raise ConfigError(
            f"engine.batch_invariant is true, which needs GPUs of compute capability {required} (H100) or newer; there "
            "is none; set engine.batch_invariant=false"
        )
    capability = torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", "0")))
    if capability < CAPABILITY:
        raise ConfigError(
            f"engine.batch_invariant is true, but {torch.cuda.get_device_name()} has compute capability "
            f"{'.'.join(map(str, capability))}; expected {required} (H100) or newer: below, vLLM replaces torch's "
            "matrix products in this process by some without gradient; set engine.batch_invariant=false"
        )
