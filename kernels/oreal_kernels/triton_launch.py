"""Launch options of the Triton kernels, as a table: nothing is tuned at start-up, all architectures have the same.

The passes over logits were timed on an H200 (docs/how_to/gpu.md). The others come from counts of bytes, registers and
shared memory (tools/compile_kernels.py prints them).
"""

from __future__ import annotations

from typing import Any

import torch

COLUMNS_PER_PART = 32768  # of a row, read by one program: enough programs for few rows, yet few partial results

# z = logit / temperature must be rounded before the maximum is subtracted, or p differs from the summed one.
_EXACT = dict(enable_fp_fusion=False)
ON_GPU: dict[str, dict[str, int]] = {
    "statistics": dict(BLOCK=2048, num_warps=4, **_EXACT),
    "gradient": dict(BLOCK=4096, num_warps=8, **_EXACT),
    "combine": dict(BLOCK=256, num_warps=4),
    "token_weights": dict(BLOCK=1024, num_warps=4),
    "policy_terms": dict(BLOCK=1024, num_warps=4),
    "rotary": dict(BLOCK=8, num_warps=4),
}
# In the interpreter every block is a numpy call; small blocks make tests cross block boundaries.
_INTERPRETED: dict[str, dict[str, int]] = {name: dict(BLOCK=64) for name in ON_GPU} | {"rotary": dict(BLOCK=4)}


def options(kernel: str, device: torch.device) -> dict[str, Any]:
    """Return block sizes and warps of a kernel on a device."""
    return (ON_GPU if device.type == "cuda" else _INTERPRETED)[kernel]
