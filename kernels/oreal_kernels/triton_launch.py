"""Launch options of the Triton kernels for each GPU architecture, as tables: nothing is tuned at start-up.

The passes over logits were timed on an H200 (docs/how_to/gpu.md). The others come from counts of bytes, registers and
shared memory (tools/compile_kernels.py prints them).
"""

from __future__ import annotations

from typing import Any

import torch

COLUMNS_PER_PART = 32768  # of a row, read by one program: enough programs for few rows, yet few partial results

# z = logit / temperature must be rounded before the maximum is subtracted, or p differs from the summed one.
_EXACT = dict(enable_fp_fusion=False)
_COMMON: dict[str, dict[str, int]] = {
    "statistics": dict(BLOCK=2048, num_warps=4, **_EXACT),
    "gradient": dict(BLOCK=4096, num_warps=8, **_EXACT),
    "combine": dict(BLOCK=256, num_warps=4),
    "token_weights": dict(BLOCK=1024, num_warps=4),
    "policy_terms": dict(BLOCK=1024, num_warps=4),
    "rotary": dict(BLOCK=8, num_warps=4),
}
TABLES: dict[int, dict[str, dict[str, int]]] = {80: _COMMON, 90: _COMMON, 100: _COMMON}  # by compute capability
# In the interpreter every block is a numpy call; small blocks make tests cross block boundaries.
_INTERPRETED: dict[str, dict[str, int]] = {name: dict(BLOCK=64) for name in _COMMON} | {"rotary": dict(BLOCK=4)}


def options(kernel: str, device: torch.device) -> dict[str, Any]:
    """Return block sizes, warps and stages of a kernel; the nearest older architecture serves one without a table."""
    if device.type != "cuda":
        return _INTERPRETED[kernel]
    major, minor = torch.cuda.get_device_capability(device)
    known = [capability for capability in TABLES if capability <= 10 * major + minor] or [min(TABLES)]
    return TABLES[max(known)][kernel]
