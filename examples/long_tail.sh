#!/usr/bin/env bash
# Does learning suffer if steps do not wait for their longest response? Two arms with three paired seeds at equal numbers
# of trained prompts, on a task with heavy-tailed response lengths: held-out accuracy, and seconds of generation.
#     bash examples/long_tail.sh [JOBS [KEY=VALUE ...]]
# JOBS: runs side by side, 1 by default; each has two processes, so that seconds of generation compare only with 1, where
# both arms of a seed run one after the other. KEY=VALUE: settings of both arms, for example
# engine.enforce_eager=false. On a machine whose .venv exists it is used as it is. A second start continues.
# Writes runs/long_tail.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
jobs=${1:-1}
[[ $jobs =~ ^[1-9][0-9]*$ ]] || { echo "long_tail: JOBS is '$jobs'; expected a whole number from 1 on" >&2; exit 2; }
settings=()
for setting in "${@:2}"; do
    [[ $setting == *=* ]] || { echo "long_tail: unknown argument '$setting'; expected KEY=VALUE" >&2; exit 2; }
    settings+=(--set "$setting")
done
arms=waiting,partial folder=runs/long_tail recipes=examples/recipes/long_tail.py python=.venv/bin/python
say() { printf '\n== %s (%s s so far)\n' "$1" "$SECONDS"; }
export OMP_NUM_THREADS=1
[ -x $python ] || bash tools/install_cpu.sh
if [ ! -f $folder/sft/policy/config.json ]; then
    say "a small policy with its own tokenizer, and problems"
    rm -rf $folder
    $python tools/make_long_tail_task.py $folder --seed 0
    for stage in sft sft_care; do
        say "supervised fine-tuning: $stage"
        $python -m oreal_megatron --processes 2 sft $recipes:$stage
    done
fi
say "arms $arms"
$python tools/compare_arms.py run $recipes $folder --arms $arms --seeds 3 --jobs "$jobs" --processes 2 "${settings[@]}"
$python tools/compare_arms.py table $folder --arms $arms --seeds 3 --picture $folder/arms.png
