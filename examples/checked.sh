#!/usr/bin/env bash
# The token-level reward model at work, from nothing on two CPU cores: it finds the wrong steps of running sums.
#     bash examples/checked.sh [--seed N]
# Teaches a small policy that errs in every seventh step, runs OREAL on it, and draws the learning curve, the reward
# model's calibration, and an incorrect rollout coloured by token weight. Everything is written under runs/checked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$(date +%s)
seed=0
while [ $# -gt 0 ]; do
    case $1 in
        --seed) seed=${2:?"checked: --seed needs a number"}; shift 2 ;;
        *) echo "checked: unknown option $1; known is --seed N" >&2; exit 2 ;;
    esac
done
[[ $seed =~ ^[0-9]+$ ]] || { echo "checked: --seed is '$seed'; expected a whole number" >&2; exit 2; }

export OMP_NUM_THREADS=1
folder=runs/checked
rm -rf "$folder"
bash examples/checked_policy.sh "$seed"
.venv/bin/oreal --processes 2 train examples/recipes/checked.py:oreal --set seed="$seed"
.venv/bin/oreal report "$folder/oreal" --picture "$folder/learning_curve.png" --calibration "$folder/calibration.png" \
    --heat-map "$folder/heat_map.png" --summary "$folder/summary.json" --started "$started"
echo "wrong steps found (ROC AUC): score and weight at the first wrong step, mean score of the rollout"
.venv/bin/python tools/step_localisation.py "$folder/oreal"
