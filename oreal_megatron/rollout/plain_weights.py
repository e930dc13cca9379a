"""On a CPU, vLLM packs its weights after loading and multiplies with the packed copy; writing to the parameters that
remain would change nothing. `keep()` before an engine is made leaves them as they are, as on a GPU.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers import utils


def keep() -> None:
    """Let linear layers of engines made from now on multiply with the parameter itself (CPU only)."""
    utils.dispatch_cpu_unquantized_gemm = _plain


def refusal(model: nn.Module) -> str:
    """Which layer multiplies with a packed copy of its weight, as a reason; empty when none does."""
    for name, module in model.named_modules():
        if getattr(module, "cpu_linear", F.linear) is not F.linear:
            return f"{name} multiplies with a packed copy of its weight"
    return ""


def _plain(layer: nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = F.linear
