#!/usr/bin/env bash
# Start a recipe on one machine or many: torchrun's rendezvous, no Ray. Safe to start again: the run continues
# from its newest valid checkpoint.
#     bash examples/cluster/launch.sh --recipe oreal_7b_8_gpus                          this machine alone
#     bash examples/cluster/launch.sh --recipe oreal_7b --hosts a,b,c,d                 four machines, through ssh
#     bash examples/cluster/launch.sh --recipe oreal_7b --nodes 4 --rendezvous a:29400  the same by hand, on each of them
#     srun bash examples/cluster/launch.sh --recipe oreal_7b                            in a Slurm job (examples/slurm)
# Options:
#     --recipe NAME       a function of examples/recipes/oreal.py, or path/to/file.py:function
#     --gpus N            all together (default: what the recipe was made for)
#     --gpus-per-node N   of each machine (default 8)
#     --hosts A,B,...     machines that ssh reaches without a password and that see this folder at this path; the first
#                         one holds the rendezvous
#     --nodes N --rendezvous HOST:PORT
#     --max-restarts N    how often lost processes are replaced without leaving the machines (default 3)
#     --quick-doctor      before the start, check with `oreal doctor --quick` only: without its real runs on every GPU of
#                         the machine, which take some minutes
#     --no-doctor         do without these checks
#     --dry-run           print what every machine would run, and run nothing
#     -- WORD ...         goes to `oreal train`, e.g. -- --set loss.kl_coef=0.02
# Exit codes: 0 done, 2 bad input, 3 stopped, 4 preempted and saved, 5 hung or lost a rank. 4 and 5: start it again.
# shellcheck disable=SC2029  # what ssh runs is put together here on purpose
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bad() { echo "launch: $1" >&2; exit 2; }

recipe="" gpus="" per_node=8 hosts="" nodes="" rendezvous="" restarts=3 doctor=full dry="" words=()
while [ $# -gt 0 ]; do
    case $1 in
        --recipe) recipe=${2:?"launch: --recipe needs a name"} ;;
        --gpus) gpus=${2:?"launch: --gpus needs a number"} ;;
        --gpus-per-node) per_node=${2:?"launch: --gpus-per-node needs a number"} ;;
        --hosts) hosts=${2:?"launch: --hosts wants names"} ;;
        --nodes) nodes=${2:?"launch: --nodes needs a number"} ;;
        --rendezvous) rendezvous=${2:?"launch: --rendezvous wants HOST:PORT"} ;;
        --max-restarts) restarts=${2:?"launch: --max-restarts needs a number"} ;;
        --quick-doctor) doctor=quick; shift; continue ;;
        --no-doctor) doctor=""; shift; continue ;;
        --dry-run) dry=yes; shift; continue ;;
        --) shift; words=("$@"); break ;;
        *) bad "unknown option $1; the head of examples/cluster/launch.sh names the known ones" ;;
    esac
    shift 2
done

# -- which recipe, on which machines ----------------------------------------------------------------------------------
# The Python that PYTHON names, else .venv where there is one, else that of the environment this was started in.
python=${PYTHON:-$PWD/.venv/bin/python}
python=$(command -v "$python" || command -v python3) || bad "there is no python3; the recipes are Python functions"
[ -n "$recipe" ] || bad "--recipe is missing; examples/recipes/oreal.py holds them"
[[ $recipe == *:* ]] || recipe=examples/recipes/oreal.py:$recipe
name=${recipe##*:}
read_recipe='import sys
from oreal_megatron import config, settings
try:
    print(settings.from_recipe(sys.argv[1]).gpus)
except config.ConfigError as error:
    sys.exit(f"launch: {error}")'
meant=$("$python" -c "$read_recipe" "$recipe") || exit 2  # needs no package but this one
gpus=${gpus:-$meant}
for number in "$gpus" "$per_node" "$restarts" "${nodes:-1}"; do
    [[ $number =~ ^[0-9]+$ ]] || bad "$number is not a whole number"
done
[ "$gpus" -gt 0 ] || bad "$recipe does not say for how many GPUs it is; name them with --gpus N"
if [ "$gpus" -lt "$per_node" ]; then per_node=$gpus; fi
[ "$per_node" -gt 0 ] && [ $((gpus % per_node)) = 0 ] || bad "$gpus GPUs cannot be had from machines of $per_node each"
wanted=$((gpus / per_node))

names=("${OREAL_HOST:-$(hostname)}")
if [ -n "$hosts" ]; then
    IFS=, read -r -a names <<< "$hosts"
elif [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
elif [ -z "$rendezvous" ] && [ "$wanted" -gt 1 ] && [ -n "$dry" ]; then  # none is named yet: show invented ones
    mapfile -t names < <(seq -f 'node%g' "$wanted")
fi
nodes=${nodes:-${#names[@]}}
small=""
if [ "$nodes" = 1 ] && grep -q "^def ${name}_${per_node}_gpus(" "${recipe%%:*}"; then
    small="; this machine alone: bash examples/cluster/launch.sh --recipe ${recipe}_${per_node}_gpus"
fi
[ "$nodes" = "$wanted" ] || bad "$name on $gpus GPUs takes $wanted machines of $per_node, not $nodes; name them with \
--hosts, or start this on each of them with --nodes $wanted --rendezvous HOST:PORT, or choose another recipe or --gpus\
$small"
if [ "$nodes" -gt 1 ]; then rendezvous=${rendezvous:-${names[0]}:29400}; fi

# -- what each of them runs -------------------------------------------------------------------------------------------
settings=(
    # Warnings alone, with the interface and the peer they are about; INFO at 128 ranks hides everything else.
    "NCCL_DEBUG=${NCCL_DEBUG:-WARN}"
    # Every rank remembers its last collectives, so that after a hang one can see who did not take part in which.
    "TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}"
    # One queue of kernels to the GPU: communication is not delayed behind matrix products that were issued with it.
    # Megatron asks for it where tensor and sequence parallelism overlap the two.
    "CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    # Seconds that processes may take to save after a signal before they are killed.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
    # The machines agree on an address of the first rank in every round. By default torch says it in the first round
    # only, and a machine that joins later, because it was lost, waits for it in vain.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    # Tells jobs apart that meet at the same address.
    "PET_RDZV_ID=${SLURM_JOB_ID:-$name}"
)
# NCCL (for its first contact; it finds InfiniBand by itself) and gloo guess the network. A machine with several, or one
# whose name means 127.0.1.1, must be told: OREAL_INTERFACE=eth0.
if [ -n "${OREAL_INTERFACE:-}" ]; then
    settings+=("NCCL_SOCKET_IFNAME=$OREAL_INTERFACE" "GLOO_SOCKET_IFNAME=$OREAL_INTERFACE")
fi
logs=${OREAL_RUNS:-runs}/logs/$name
meet=()
if [ "$nodes" -gt 1 ]; then meet=(--nodes "$nodes" --rendezvous "$rendezvous"); fi
supervisor=("$python" -m oreal_megatron --processes "$per_node" --max-restarts "$restarts" "${meet[@]}" --logs)
train=(train "$recipe" --resume auto "${words[@]}")
check=(env "${settings[@]}" "$python" -m oreal_megatron doctor --gpus "$per_node")
if [ "$doctor" = quick ]; then check+=(--quick); fi
check+=("$recipe")

if [ -n "$dry" ]; then
    echo "# $recipe on $gpus GPUs, $nodes x $per_node, in $PWD"
    for host in "${names[@]}"; do
        echo "# $host"
        if [ -n "$doctor" ]; then printf '%q ' "${check[@]}"; echo; fi
        printf '%q ' env "${settings[@]}" "${supervisor[@]}" "$logs/$host" "${train[@]}"; echo
    done
    exit 0
fi
"$python" -c 'import torch, megatron.core' 2> /dev/null || bad "$python has no torch or Megatron-core; make the \
environment first (README.md), where every machine sees it"

# -- start it on every listed machine, and stop it on every one -------------------------------------------------------
if [ -n "$hosts" ] && [ "$nodes" -gt 1 ]; then
    again=(bash examples/cluster/launch.sh --recipe "$recipe" --gpus "$gpus" --gpus-per-node "$per_node"
        --max-restarts "$restarts" "${meet[@]}")
    case $doctor in quick) again+=(--quick-doctor) ;; "") again+=(--no-doctor) ;; esac
    # Settings go along, but not what is one machine's own.
    carried=()
    for variable in $(compgen -e); do
        case $variable in
            CUDA_VISIBLE_DEVICES | VLLM_HOST_IP | PET_LOCAL_ADDR | PET_NODE_RANK) ;;
            OREAL* | NCCL* | GLOO* | TORCH* | PYTORCH* | PET_* | PYTHON* | OMP_* | CUDA_* | VLLM_* | HF_* | TRITON_* | \
                NVTE_* | LD_LIBRARY_PATH) carried+=("$variable=${!variable}") ;;
        esac
    done
    ends=$(mktemp --directory)  # one file for every code that a machine ended with
    reach() {  # a machine's part; when its end is final, the others, which would wait for it in vain, are asked to leave
        local code=0
        # Through ssh's input: command lines, and with them the judge's key, are seen by everybody (ps).
        ssh "$1" bash <<< "cd ${PWD@Q} && export ${carried[*]@Q} OREAL_HOST=$1 \
            && exec ${again[*]@Q} -- ${words[*]@Q} < /dev/null" || code=$?
        touch "$ends/$code"
        case $code in 2 | 3) kill -TERM $$ ;; esac
    }
    leave() {
        for host in "${names[@]}"; do  # some have ended, and some are not that far yet
            ssh "$host" bash <<< "cd ${logs@Q}/$host && for second in {1..20}; do [ -s pid ] && break; sleep 1; done
                kill -TERM \$(cat pid)" 2> /dev/null || true
        done
    }
    trap leave TERM INT
    for host in "${names[@]}"; do
        rm -f "$logs/$host/pid"  # of an earlier start
        mkdir -p "$logs/$host"
        reach "$host" &
    done
    while [ -n "$(jobs -rp)" ]; do wait || true; done  # a signal ends the wait, not the machines
    for code in 2 3 1 5 4 $(cd "$ends" && printf '%s\n' * | sort -rn); do  # the cause before what follows from it
        if [ -e "$ends/$code" ]; then rm -r "$ends"; exit "$code"; fi
    done
fi

# -- this machine's part ----------------------------------------------------------------------------------------------
host=${OREAL_HOST:-$(hostname)}
mkdir -p "$logs/$host"
trap 'exit 4' TERM INT USR1  # before there is anything to save
echo $$ > "$logs/$host/pid"  # of the supervisor too, which takes this shell's place
# Kubeflow sets those of its pods, which are not those of our processes.
unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
if command -v nvidia-smi > /dev/null; then
    seen=$(nvidia-smi --list-gpus | wc -l)
    [ "$seen" -ge "$per_node" ] || bad "$host has $seen GPUs, $per_node are wanted; name fewer with --gpus-per-node"
fi
if [ -n "$doctor" ]; then "${check[@]}" || bad "oreal doctor reports failed checks on $host; it names the \
fix of each"; fi
exec env "${settings[@]}" "${supervisor[@]}" "$logs/$host" "${train[@]}"
