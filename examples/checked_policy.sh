#!/usr/bin/env bash
# Inputs and supervised policy of the checked task under FOLDER (runs/checked), unless they exist; used by the scripts
# beside it.
#     bash examples/checked_policy.sh [SEED [FOLDER]]
# Running sums modulo 10 with a written check after each step (tools/checked_steps.py). Three stages of supervised
# fine-tuning: sums without errors, checks, then the careless demonstrations that the policy shall imitate.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seed=${1:-0} folder=${2:-runs/checked} recipes=examples/recipes/checked.py
say() { printf '\n== %s (%s s so far)\n' "$1" "$SECONDS"; }
export OMP_NUM_THREADS=1 OREAL_CHECKED_FOLDER=$folder
bash tools/install_cpu.sh
if [ -f "$folder/sft/policy/config.json" ] && [ "$(cat "$folder/seed" 2> /dev/null)" = "$seed" ]; then
    echo "the supervised policy of seed $seed is there: $folder/sft/policy"
    exit 0
fi
rm -rf "$folder"
say "a small policy with its own tokenizer, and problems"
.venv/bin/python tools/make_checked_task.py "$folder" --seed "$seed"
echo "$seed" > "$folder/seed"
for stage in sft sft_checks sft_care; do
    say "supervised fine-tuning: $stage"
    .venv/bin/oreal --processes 2 sft "$recipes:$stage" --set seed="$seed"
done
