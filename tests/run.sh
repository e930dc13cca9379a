#!/usr/bin/env bash
# All tests that a machine without a GPU can run: lint, unit, dist (gloo), kernels, one short end-to-end run.
#     bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/install_cpu.sh
export OMP_NUM_THREADS=1
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --check --quiet .
.venv/bin/python -m pytest tests/unit tests/dist tests/e2e "$@"
TRITON_INTERPRET=1 .venv/bin/python -m pytest tests/kernels "$@"  # a process of its own: chosen when kernels are defined
