#!/usr/bin/env bash
# What CI runs, without a GPU: installation, checks, docs, and every test that a change needs to be trusted.
#     bash tests/run.sh [--all] [pytest arguments]
# --all adds the full matrices of layouts, families and faults (tests marked `full`; CONTRIBUTING.md lists them).
# Two steps run side by side on two cores; the output of each is shown when it ends.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export FULL="" LIMIT=3000
if [ "${1:-}" = --all ]; then
    FULL=--full LIMIT=7200
    shift
fi
bash tools/install_cpu.sh
export OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 PATH="$PWD/.venv/bin:$PATH"
unset PYTHONDONTWRITEBYTECODE # each of the many processes would compile the project's modules again
LOGS=$(mktemp -d)
export LOGS OREAL_TEST_COSTS="$LOGS/costs.jsonl"
trap 'rm -rf "$LOGS"' EXIT
SECONDS=0

static() {
    ruff check --quiet . && ruff format --check --quiet . && python tools/check_style.py && codespell &&
        shellcheck examples/*.sh examples/*/*.sh tests/*.sh tools/*.sh .ci/run && mypy
}
docs() { python -m mkdocs build --strict --site-dir "$LOGS/site"; } # warnings are errors; --quiet would count none
tests() { # pytest under a limit for the whole process: --timeout cannot end a test that hangs in C
    local code=0
    timeout --kill-after=30 "$LIMIT" python -m pytest ${FULL:+$FULL} "$@" || code=$?
    [ $code = 5 ] || return $code # 5: the arguments choose no test of this tier
}
step() { # NAME [pytest arguments]: run it, show its output as a whole, remember a failure
    local name=$1 code=0
    shift
    case $name in
        static | docs) "$name" ;;
        *) tests "tests/$name" "$@" ;; # kernels alone: Triton's interpreter is chosen at import
    esac > "$LOGS/$name" 2>&1 || code=$?
    [ $code = 0 ] || touch "$LOGS/$name.failed"
    flock "$LOGS" cat "$LOGS/$name"
    echo "== $name: $SECONDS s$([ $code = 0 ] || echo ", FAILED with exit code $code")"
}
export -f static docs tests step

steps="static e2e unit dist kernels faults engine docs"
echo "== $steps, two at a time"
# shellcheck disable=SC2086  # a list of names
printf '%s\n' $steps | xargs -P 2 -I {} bash -c 'step "$@"' bash {} "$@"
python tests/helpers/cost_recorder.py "$OREAL_TEST_COSTS"
failed=$(cd "$LOGS" && find . -name '*.failed' -printf '%f ' | sed 's/\.failed//g')
[ -z "$failed" ] || { echo "== after $SECONDS s, FAILED: $failed"; exit 1; }
echo "== after $SECONDS s: all passed"
