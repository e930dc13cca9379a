#!/usr/bin/env bash
# T1 from nothing on two CPU cores: data construction, supervised fine-tuning, reinforcement learning with every part
# of T1, evaluation and a report page.
#     bash examples/t1.sh [--seed N] [--data]
# --data ends before the reinforcement learning. A second start keeps the stages that have ended, and resumes a run of
# the last two. Everything is written under runs/t1/seed_N.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$(date +%s)
seed=0 data_only=
while [ $# -gt 0 ]; do
    case $1 in
        --seed) seed=${2-}; shift $(($# > 1 ? 2 : 1)) ;;
        --data) data_only=1; shift ;;
        *) echo "t1: unknown option $1; known are --seed N and --data" >&2; exit 2 ;;
    esac
done
[[ $seed =~ ^[0-9]+$ ]] || { echo "t1: --seed is '$seed'; expected a whole number" >&2; exit 2; }

folder=runs/t1/seed_$seed recipes=examples/recipes/t1_checked.py
export OMP_NUM_THREADS=1 OREAL_T1_FOLDER=$folder
oreal=".venv/bin/oreal --processes 2"
say() { printf '\n== %s (%s s so far)\n' "$1" "$SECONDS"; }

bash examples/checked_policy.sh "$seed" "$folder"
if [ ! -f "$folder/rated" ]; then
    say "data: pass rate of 2,000 training problems, of 16 responses each"
    head -n 2000 "$folder/problems.jsonl" > "$folder/to_rate.jsonl"
    $oreal evaluate $recipes:rate --set seed="$seed" --samples 16 --rate "$folder/rated.jsonl"
    touch "$folder/rated"
fi
if [ ! -f "$folder/rft.jsonl" ]; then
    say "data: problems that are solved at most 3 times in 10, and demonstrations of correct responses"
    .venv/bin/oreal data filter "$folder/rated.jsonl" "$folder/hard.jsonl" --max-rate 0.3 --against "$folder/held_out.jsonl"
    .venv/bin/oreal data rft "$folder"/rated.jsonl.answers/*.rating.jsonl "$folder/rft.jsonl" --choose random --per-problem 2
fi
if [ ! -f "$folder/rft/policy/config.json" ]; then
    say "supervised fine-tuning on the policy's own correct responses"
    $oreal sft $recipes:rft --set seed="$seed" --resume auto
fi
[ -z "$data_only" ] || exit 0
if [ ! -f "$folder/reinforce/policy/config.json" ]; then
    say "reinforcement learning, with an evaluation on the held-out problems before it, after it and on the way"
    $oreal train $recipes:reinforce --set seed="$seed" --resume auto
fi
if [ ! -f "$folder/summary.json" ]; then
    say "report"
    .venv/bin/oreal report "$folder/reinforce" --html "$folder/report.html" --picture "$folder/learning_curve.png" \
        --summary "$folder/summary.json" --started "$started"
fi
say "complete: $folder/report.html"
