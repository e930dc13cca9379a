#!/usr/bin/env bash
# OREAL-7B from OREAL-7B-SFT, on 32 GPUs or on 8.
#     bash examples/run_oreal_7b.sh                          this machine alone, if it has 8 GPUs (oreal_7b_8_gpus)
#     bash examples/run_oreal_7b.sh --hosts a,b,c,d          four machines of 8 GPUs
#     bash examples/run_oreal_7b.sh --dry-run                what each machine would run
# Other recipes of this size: oreal_7b_without_reward_model, oreal_dsr1_distill_qwen_7b, each also with _8_gpus behind.
# What must be there first (models, data, judge): docs/how_to/cluster.md. All options: examples/cluster/launch.sh.
recipe=oreal_7b
case " $* ${SLURM_JOB_NODELIST:+ --hosts } " in
    *" --recipe "* | *" --hosts "* | *" --nodes "* | *" --gpus "*) ;;
    *)
        if [ "$(nvidia-smi --list-gpus 2> /dev/null | grep -c .)" = 8 ]; then
            recipe=oreal_7b_8_gpus
            echo "run_oreal_7b: this machine has 8 GPUs and no other is named, so the recipe is $recipe" >&2
        fi
        ;;
esac
exec bash "$(dirname "${BASH_SOURCE[0]}")/cluster/launch.sh" --recipe "$recipe" "$@"
