#!/usr/bin/env bash
# The ablation of the paper's Table 2 on the checked task, five paired seeds, as a table and a picture.
#     bash examples/ablation.sh [JOBS]
# REINFORCE, + reward shaping, + behaviour cloning, + token-level reward model; the paper's fifth row, skills, is absent.
# JOBS: runs side by side, 2 by default; each is one process. A second start continues. Writes runs/arms.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
jobs=${1:-2}
[[ $jobs =~ ^[1-9][0-9]*$ ]] || { echo "ablation: JOBS is '$jobs'; expected a whole number from 1 on" >&2; exit 2; }
arms=reinforce,reward_shaping,behaviour_cloning,token_reward_model
bash examples/checked_policy.sh
.venv/bin/python tools/compare_arms.py run examples/recipes/checked.py runs/arms --arms "$arms" --jobs "$jobs"
.venv/bin/python tools/compare_arms.py table runs/arms --arms "$arms" --picture runs/arms/ablation.png
