#!/usr/bin/env bash
# OREAL-32B from OREAL-32B-SFT, on 128 GPUs or on 32.
#     bash examples/run_oreal_32b.sh --hosts a,b,...             sixteen machines of 8 GPUs
#     bash examples/run_oreal_32b.sh --recipe oreal_32b_32_gpus --hosts a,b,c,d
#     bash examples/run_oreal_32b.sh --dry-run                   what each machine would run
# What must be there first (models, data, judge): docs/how_to/cluster.md. All options: examples/cluster/launch.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/cluster/launch.sh" --recipe oreal_32b "$@"
