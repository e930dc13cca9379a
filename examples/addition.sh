#!/usr/bin/env bash
# OREAL from nothing on two CPU cores: real Megatron-core, real vLLM, a real verifier and a token-level reward model.
#     bash examples/addition.sh [--seed N] [--without-reward-model]
# Builds .venv, makes a small policy and addition problems, teaches it by supervised fine-tuning until it solves
# about a third of the problems, runs OREAL, and draws the learning curve. Everything is written under runs/addition.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$(date +%s)
seed=0 recipe=oreal
while [ $# -gt 0 ]; do
    case $1 in
        --seed) seed=${2-}; shift $(($# > 1 ? 2 : 1)) ;;
        --without-reward-model) recipe=oreal_without_reward_model; shift ;;
        *) echo "addition: unknown option $1; known are --seed N and --without-reward-model" >&2; exit 2 ;;
    esac
done
[[ $seed =~ ^[0-9]+$ ]] || { echo "addition: --seed is '$seed'; expected a whole number" >&2; exit 2; }

bash tools/install_cpu.sh
export OMP_NUM_THREADS=1
folder=runs/addition recipes=examples/recipes/addition.py
python=.venv/bin/python oreal=".venv/bin/oreal --processes 2"
say() { printf '\n== %s (%s s so far)\n' "$1" "$SECONDS"; }

rm -rf "$folder"
say "a small policy with its own tokenizer, and problems"
$python tools/make_addition_task.py "$folder" --seed "$seed"
say "supervised fine-tuning"
$oreal sft "$recipes:sft" --set seed="$seed"
say "pass rate of each training problem (8 responses each)"
$oreal evaluate "$recipes:oreal" --set seed="$seed" --set data.path="$folder/problems.jsonl" --samples 8 --rate "$folder/rated.jsonl"
say "OREAL"
$oreal train "$recipes:$recipe" --set seed="$seed" --set run="$folder/oreal"
say "what it learned"
.venv/bin/oreal report "$folder/oreal" --html "$folder/report.html" --picture "$folder/learning_curve.png" \
    --summary "$folder/summary.json" --started "$started"
