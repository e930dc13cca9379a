"""Triton kernels run in the interpreter here, which must be chosen before they are defined: `pytest tests/kernels`."""

from __future__ import annotations

import os
import sys

import pytest

if "oreal_kernels" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/kernels needs a pytest of its own: Triton's interpreter is chosen at import")
os.environ["TRITON_INTERPRET"] = "1"

from oreal_kernels import backend, native  # noqa: E402


@pytest.fixture(params=["triton", "native", "reference"])
def served_by(request):
    """Each operation by each backend, on CPU tensors."""
    if request.param == "native" and not native.available():
        pytest.skip("the native library is not built here: cmake and a C++ compiler are needed")
    with backend.use(request.param):
        yield request.param
