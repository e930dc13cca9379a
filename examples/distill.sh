#!/usr/bin/env bash
# Distillation on CPU: a small student learns two-digit addition from demonstrations alone, and with a teacher whose
# hidden states are ten times as large.
#     bash examples/distill.sh [SEED ...]
# Seeds 0, 1 and 2 by default. A second start continues where the first ended. Prints held-out accuracy by step;
# everything is written under runs/distill.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- 0 1 2
for seed in "$@"; do
    [[ $seed =~ ^[0-9]+$ ]] || { echo "distill: seed '$seed'; expected whole numbers" >&2; exit 2; }
done
bash tools/install_cpu.sh
export OMP_NUM_THREADS=1
recipes=examples/recipes/distill.py arms="cross_entropy pearson mse kl_logits" runs=()
for seed in "$@"; do
    export OREAL_DISTILL_FOLDER=runs/distill/seed_$seed
    folder=$OREAL_DISTILL_FOLDER
    if [ ! -f "$folder/made" ]; then
        .venv/bin/python tools/make_addition_task.py "$folder" --seed "$seed" --below 100 --student \
            --training 0 --held-out 500 --demonstrations 4000
        touch "$folder/made"
    fi
    if [ ! -f "$folder/teacher_scaled/config.json" ]; then
        .venv/bin/oreal sft "$recipes:teacher" --set seed="$seed" --resume auto
        .venv/bin/python tools/scale_features.py "$folder/teacher/policy" "$folder/teacher_scaled" --factor 10
    fi
    for arm in $arms; do
        command=distill
        [ "$arm" != cross_entropy ] || command=sft
        [ -f "$folder/$arm/policy/config.json" ] ||
            .venv/bin/oreal $command "$recipes:$arm" --set seed="$seed" --resume auto
        runs+=("$folder/$arm")
    done
done
for run in "${runs[@]}"; do
    printf '%s: ' "${run#runs/distill/}"
    .venv/bin/python -c "import json, sys
print(*(f\"{row['step']}: {row['accuracy']:.3f}\" for row in map(json.loads, open(sys.argv[1]))), sep=', ')" \
        "$run/evaluations.jsonl"
done
.venv/bin/oreal report "${runs[@]}" --picture runs/distill/learning_curves.png
