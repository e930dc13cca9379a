"""Patches of vLLM 0.31 and transformers: every place where this project changes the libraries for the engine.

| patch | reason | upstream | can go when |
|---|---|---|---|
| `register_internlm` | transformers runs code of the model folder to read its config | none | it has InternLM |
| `keep_plain_weights` | on CPUs vLLM multiplies with a packed copy of a parameter | none | packing is optional |
| `divide_logits` | raw log-probs are of temperature 1, processed ones of the tokens within top_p | none | it has both |
| `name_shared_memory` | on CPUs the names are rank numbers: two jobs collide | none | names contain a job's id |
| `unlink_shared_memory` | on CPUs a killed job leaves it in /dev/shm | none | vLLM unlinks it when it is open |

"none": no issue is known. runtime/versions.py refuses releases for which the patches were not written.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from vllm.distributed.device_communicators import cpu_communicator
from vllm.model_executor.layers import utils
from vllm.platforms import current_platform


def register_internlm() -> None:
    """Let transformers read config.json of InternLM2 and 3 as plain fields, which is all that vLLM needs."""
    for kind in ("internlm2", "internlm3"):
        AutoConfig.register(kind, type(kind, (PretrainedConfig,), {"model_type": kind}), exist_ok=True)


def keep_plain_weights() -> None:
    """Let linear layers of engines created from now on multiply with the parameter itself, as on a GPU (CPU only)."""
    utils.dispatch_cpu_unquantized_gemm = _use_plain_weight


def divide_logits(model: nn.Module, temperature: float) -> None:
    """Let a model return its logits divided by a temperature, in float32 as the trainer's head does; 1: as they are."""
    compute_logits: Any = model.compute_logits

    def divided_logits(*args: Any, **kwargs: Any) -> Tensor | None:
        logits: Tensor | None = compute_logits(*args, **kwargs)
        return None if logits is None else logits.float().div_(temperature)

    if temperature != 1.0:
        vars(model)["compute_logits"] = divided_logits


def packed_weight(model: nn.Module) -> str:
    """Explain which layer multiplies with a packed copy of its weight; "" if none does."""
    for name, module in model.named_modules():
        if getattr(module, "cpu_linear", F.linear) is not F.linear:
            return f"{name} multiplies with a packed copy of its weight"
    return ""


def _use_plain_weight(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = F.linear


def name_shared_memory(job: str) -> None:
    """Let names of shared memory begin with a job's id, equal on all ranks and never used before (CPU only)."""
    if not current_platform.is_cpu():
        return
    shared = cpu_communicator._CPUSHMDistributed
    original = shared.make_group_name
    # Such a name may contain no slash but the first; vLLM's begins with those of "env://".
    shared.make_group_name = staticmethod(lambda communicator: f"/{job}{original(communicator).strip('/')}")


def unlink_shared_memory(folder: Path = Path("/dev/shm")) -> None:
    """Let shared memory lose its name once all ranks of a replica have it open: it ends with them (CPU only)."""
    if not current_platform.is_cpu():
        return
    shared: Any = cpu_communicator._CPUSHMDistributed
    original = shared._init_cpu_shm

    def init_and_unlink(self: Any) -> int:
        handle: int = original(self)  # ends with a barrier of the replica
        for file in folder.glob(f"{glob.escape(self.group_name.strip('/'))}*"):
            file.unlink(missing_ok=True)
        return handle

    shared._init_cpu_shm = init_and_unlink
