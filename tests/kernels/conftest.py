"""Each operation by each backend on CPU tensors. Triton's interpreter is chosen before kernels are defined."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def interpreted() -> None:
    """Skip in a process whose kernels were defined without the interpreter; tests/conftest.py chooses it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a pytest of its own: python -m pytest tests/kernels")


@pytest.fixture(params=["triton", "native", "reference"])
def served_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the backend in use."""
    from oreal_kernels import backend, native  # not above: conftest files are imported before the interpreter is chosen

    if request.param == "native" and not native.available():
        pytest.skip("the native library is not built here: cmake and a C++ compiler are needed")
    with backend.use(request.param):
        yield request.param
