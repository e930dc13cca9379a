# Sourced by the .sbatch files.
# shellcheck shell=bash

# Start a command once on every machine of the job; put the job back into the queue when its end asks for that.
run_and_requeue() {
    local code=0 cause ends=${OREAL_RUNS:-runs}/logs/slurm-$SLURM_JOB_ID
    # One file for every code that a machine ended with. srun's own code is the largest, which tells little: where one
    # machine found bad input the others lose their rendezvous (5), or are killed because they waited in vain (137).
    # shellcheck disable=SC2016  # the inner shell expands it
    local note='trap : TERM INT USR1; ends=$1; shift; "$@"; code=$?; touch "$ends/$code"; exit "$code"'
    rm -rf "$ends" && mkdir -p "$ends"
    # --wait: when one machine has ended, the others have five minutes to end as well, to save for example;
    # --kill-on-bad-exit: whatever slurm.conf says, they are not killed at once.
    # --cpu-bind: one task that starts eight processes must not be bound to the few cores of one task.
    srun --wait=300 --kill-on-bad-exit=0 --cpu-bind=none bash -c "$note" note "$ends" "$@" || code=$?
    for cause in 2 3 1 5 4; do  # the cause before what follows from it
        if [ -e "$ends/$cause" ]; then code=$cause; break; fi
    done
    case $code in
        4 | 5) # preempted and saved, or a rank was lost: the next start continues from the newest checkpoint
            echo "ended with code $code; back into the queue"
            scontrol requeue "$SLURM_JOB_ID"
            ;;
    esac
    exit "$code"
}
