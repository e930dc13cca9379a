#!/usr/bin/env bash
# Inputs and supervised policy of the checked task under runs/checked, unless they exist; used by the scripts beside it.
#     bash examples/checked_policy.sh [SEED]
# Running sums modulo 10 with a written check after each step (tools/checked_steps.py). Three stages of supervised
# fine-tuning: sums without errors, checks, then the careless demonstrations that the policy shall imitate.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seed=${1:-0} folder=runs/checked recipes=examples/recipes/checked.py
export OMP_NUM_THREADS=1
bash tools/install_cpu.sh
[ -f "$folder/sft/policy/config.json" ] && exit 0
rm -rf "$folder"
.venv/bin/python tools/make_checked_task.py "$folder" --seed "$seed"
for stage in sft sft_checks sft_care; do
    .venv/bin/oreal --processes 2 sft "$recipes:$stage" --set seed="$seed"
done
