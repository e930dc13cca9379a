# Sourced by the .sbatch files.
# shellcheck shell=bash

# Start a command once on every machine of the job; put the job back into the queue when its end asks for that.
run_and_requeue() {
    local code=0
    # --wait: when one machine has ended, the others have five minutes to end as well, to save for example.
    srun --wait=300 "$@" || code=$?
    case $code in
        4 | 5) # preempted and saved, or a rank was lost: the next start goes on with the newest checkpoint
            echo "ended with code $code; back into the queue"
            scontrol requeue "$SLURM_JOB_ID"
            ;;
    esac
    exit "$code"
}
