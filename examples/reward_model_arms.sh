#!/usr/bin/env bash
# Does the token-level reward model help? Arms with five paired seeds on the checked task, as a table and a picture.
#     bash examples/reward_model_arms.sh [JOBS]
# JOBS: runs side by side, 2 by default; each is one process. A second start continues. Writes runs/arms.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
jobs=${1:-2}
[[ $jobs =~ ^[1-9][0-9]*$ ]] || { echo "reward_model_arms: JOBS is '$jobs'; expected a whole number from 1 on" >&2; exit 2; }
arms=without_reward_model,oreal,belief_of_token,prefix_objective,shuffled_weights,true_errors
bash examples/checked_policy.sh
.venv/bin/python tools/compare_arms.py run examples/recipes/checked.py runs/arms --arms "$arms" --jobs "$jobs"
.venv/bin/python tools/compare_arms.py table runs/arms --arms "$arms" --picture runs/arms/arms.png
