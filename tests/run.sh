#!/usr/bin/env bash
# What CI runs, without a GPU: installation, checks, docs, and every test that a change needs to be trusted.
#     bash tests/run.sh [--all] [pytest arguments]
# --all adds the full matrices of layouts, families and faults (tests marked `full`; CONTRIBUTING.md lists them).
# Two lanes run side by side on two cores; the first one's output is shown when it ends.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
full=() limit=3000
if [ "${1:-}" = --all ]; then
    full=(--full) limit=7200
    shift
fi
bash tools/install_cpu.sh
export OMP_NUM_THREADS=1 PATH="$PWD/.venv/bin:$PATH"
logs=$(mktemp -d)
export OREAL_TEST_COSTS="$logs/costs.jsonl"
trap 'kill "${lane:-0}" 2> /dev/null; rm -rf "$logs"' EXIT
failed=()

step() { # NAME COMMAND...: run it, remember a failure and go on
    local name=$1 code=0
    shift
    echo "== $name ($SECONDS s)"
    "$@" || code=$?
    [ $code = 0 ] || { echo "== FAILED: $name (exit code $code)"; echo "$name" >> "$logs/failed"; }
}
tests() { # pytest under a limit for the whole process: --timeout cannot end a test that hangs in C
    local code=0
    timeout --kill-after=30 $limit python -m pytest "${full[@]}" "$@" || code=$?
    [ $code = 5 ] || return $code # 5: the arguments choose no test of this tier
}

step "ruff" ruff check --quiet .
step "format" ruff format --check --quiet .
step "style" python tools/check_style.py
step "spelling" codespell
step "shell scripts" shellcheck examples/*.sh examples/*/*.sh tests/*.sh tools/*.sh .ci/run
{
    step "types" mypy
    export NO_MKDOCS_2_WARNING=1
    step "docs" python -m mkdocs build --strict --site-dir "$logs/site" # warnings are errors; --quiet would count none
    step "unit tests" tests tests/unit "$@"
    step "kernel tests" tests tests/kernels "$@" # a process of its own: Triton's interpreter is chosen at import
} > "$logs/lane" 2>&1 &
lane=$!
step "dist, engine, e2e and fault tests" tests tests/dist tests/engine tests/e2e tests/faults "$@"
wait "$lane" || true
cat "$logs/lane"
python tests/helpers/cost_recorder.py "$OREAL_TEST_COSTS"
[ ! -f "$logs/failed" ] || mapfile -t failed < "$logs/failed"
echo "== ${#failed[@]} steps failed after $SECONDS s${failed[*]:+: ${failed[*]}}"
[ ${#failed[@]} = 0 ]
