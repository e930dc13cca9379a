#!/usr/bin/env bash
# The ablation of T1 on the checked task, three paired seeds from one supervised policy, as a table and a picture:
# responses per problem, temperature, penalties, entropy bonus and moving reference, each against the first arm.
#     bash examples/t1_ablation.sh [JOBS]
# JOBS: runs side by side, 2 by default; each is one process. A second start skips finished runs. Writes runs/t1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
jobs=${1:-2}
[[ $jobs =~ ^[1-9][0-9]*$ ]] || { echo "t1_ablation: JOBS is '$jobs'; expected a whole number from 1 on" >&2; exit 2; }
arms=rollouts_16,rollouts_4,rollouts_64,temperature_09,temperature_10,temperature_14
arms=$arms,without_penalties,without_entropy_bonus,fixed_reference
folder=runs/t1/ablation
bash examples/t1.sh --data
.venv/bin/python tools/compare_arms.py run examples/recipes/t1_checked.py $folder --arms "$arms" --seeds 3 --jobs "$jobs"
.venv/bin/python tools/compare_arms.py table $folder --arms "$arms" --seeds 3 --picture $folder/ablation.png
