#!/usr/bin/env bash
# Does a warm-started token reward model help SmolLM2-135M? Four arms with three paired seeds, as a table and a picture.
#     bash examples/smollm2_arms.sh [JOBS] [--set KEY=VALUE]...
# JOBS: runs side by side, 1 by default; each is one process. One CPU core: an estimated 14 hours; docs/evidence/learning.md has
# settings for a GPU. A second start continues. Everything is written under runs/smollm2.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
jobs=1
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] && { jobs=$1; shift; }
[[ $# = 0 || $1 = --set ]] || { echo "smollm2_arms: unknown argument '$1'; expected JOBS and --set KEY=VALUE" >&2; exit 2; }
folder=runs/smollm2 recipes=examples/recipes/smollm2.py
arms=without_reward_model,belief_of_token,warm_belief_of_token,warm_prefix_mean
bash examples/smollm2_policy.sh "$@"
if [ ! -f $folder/reward_model/reward_model/config.json ]; then
    printf '\n== the reward model, from rated rollouts of other problems\n'
    [ -f $folder/rated/problems.jsonl ] || .venv/bin/python tools/make_word_problems.py $folder/rated --seed 1
    .venv/bin/oreal --processes 1 evaluate $recipes:oreal --set data.problems=$folder/rated/problems.jsonl \
        --rate $folder/rated/rated.jsonl --samples 8 "$@"
    rm -rf $folder/reward_model
    .venv/bin/oreal --processes 1 reward-model $recipes:warm_start "$@"
fi
.venv/bin/python tools/compare_arms.py run $recipes $folder/arms --arms $arms --seeds 3 --jobs "$jobs" "$@"
.venv/bin/python tools/compare_arms.py table $folder/arms --arms $arms --seeds 3 --picture $folder/arms/arms.png
