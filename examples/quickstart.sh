#!/usr/bin/env bash
# OREAL from nothing on two CPU cores: real Megatron-core, real vLLM, a real verifier and a token-level reward model.
#     bash examples/quickstart.sh [--seed N] [--without-reward-model]
# Builds .venv, teaches a small policy running sums in which it errs in every seventh step, runs OREAL, and shows that
# the policy improves and that the reward model finds the wrong steps. Everything is written under runs/checked; a
# second start with the same seed keeps the supervised policy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$(date +%s)
seed=0 recipe=quickstart
while [ $# -gt 0 ]; do
    case $1 in
        --seed) seed=${2-}; shift $(($# > 1 ? 2 : 1)) ;;
        --without-reward-model) recipe=without_reward_model; shift ;;
        *) echo "quickstart: unknown option $1; known are --seed N and --without-reward-model" >&2; exit 2 ;;
    esac
done
[[ $seed =~ ^[0-9]+$ ]] || { echo "quickstart: --seed is '$seed'; expected a whole number" >&2; exit 2; }

export OMP_NUM_THREADS=1
folder=runs/checked
run=$folder/$recipe
say() { printf '\n== %s (%s s so far)\n' "$1" "$SECONDS"; }

bash examples/checked_policy.sh "$seed"
say "OREAL"
rm -rf "$run"
.venv/bin/oreal --processes 2 train "examples/recipes/checked.py:$recipe" --set seed="$seed" --set run="$run"
say "what it learned"
pictures=()
[ $recipe = quickstart ] && pictures=(--calibration "$run/calibration.png" --heat-map "$run/heat_map.png")
.venv/bin/oreal report "$run" --html "$run/report.html" --picture "$run/learning_curve.png" "${pictures[@]}" \
    --summary "$run/summary.json" --started "$started"
.venv/bin/python tools/step_localisation.py "$run"
