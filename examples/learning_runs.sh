#!/usr/bin/env bash
# The six learning runs of docs/evidence/learning.md: three seeds, with and without the token-level reward model.
#     bash examples/learning_runs.sh
# About 25 minutes on two cores. Leaves runs/learning/seed_N and prints the table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
runs=()
for seed in 0 1 2; do
    folder=runs/learning/seed_$seed
    bash examples/addition.sh --seed "$seed"
    .venv/bin/oreal --processes 2 train \
        examples/recipes/addition.py:oreal_without_reward_model --set seed="$seed"
    mkdir -p runs/learning
    rm -rf "$folder"
    mv runs/addition "$folder"
    runs+=("$folder/oreal" "$folder/without_reward_model")
done
.venv/bin/oreal report "${runs[@]}" --picture runs/learning/learning_curves.png
