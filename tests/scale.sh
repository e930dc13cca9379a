#!/usr/bin/env bash
# The whole matrix of layouts, up to four gloo processes: every one gives the same gradient. And random batches on two to
# four replicas of two pipeline stages.
#     bash tests/scale.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/install_cpu.sh
OREAL_MATRIX=whole OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/dist/test_gradients.py tests/dist/test_packing.py "$@"
