#!/bin/bash
# Run a Python script of one's own on several GPUs and nodes, by torchrun.
#
#   sbatch --nodes=2 --gres=gpu:8 jobs/distributed/job.sh train.py --epochs 5
#                                                           on a cluster, as it is
#   toolkit submit distributed --gpus 8 -- --nodes=2 train.py --epochs 5
#                                                           with the options of a site
#   PROCESSES=2 bash jobs/distributed/job.sh train.py       on this machine, without Slurm
#
# Its arguments are the script and what the script takes. Submitted with one task per node it
# starts a process for each GPU there; with several tasks per node each of them is one process.
# Every process finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. In the container
# the folder of the script is /code, read-only; it starts in /results, which is the folder of
# results itself and the same for all processes. It reads, beside what every job reads:
#
#   CODE                   folder to be /code, in which the script is; by default the script's
#   PROCESSES              processes per node; by default as many as the job has GPUs there
#   TOOLKIT_CPU_BIND       --cpu-bind of srun for one task on each GPU of a whole node
#
# A process that dies ends the job at once: the log tells which was the first, and why, and its
# exit status is the job's. All processes get the signal USR1 before the time limit if they
# handle it; when they then save their state and end with 85, the job does.
#SBATCH --job-name=distributed
#SBATCH --nodes=1
#SBATCH --gres=gpu:2
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u

# Slurm runs a copy of this file, so the project is looked for where the job was submitted,
# then where Slurm says that the file was, then around the file itself.
find_project() {
    local place=$1
    while [[ $place == /?* ]]; do
        if [ -f "$place/jobs/common.sh" ] && [ -d "$place/jobs/sites" ]; then
            TOOLKIT_HOME=$place
            return
        fi
        place=${place%/*}
    done
    return 1
}
submitted_file() {
    local file
    [ -n "${SLURM_JOB_ID:-}" ] || return 0
    file=$(timeout 30 scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/^ *Command=//p')
    # Its arguments follow, and its name may hold blanks.
    while [ ! -e "$file" ] && [[ $file == *' '* ]]; do file=${file% *}; done
    readlink -f -- "$file"
}
[ -n "${TOOLKIT_HOME:-}" ] || find_project "${SLURM_SUBMIT_DIR:-}" ||
    find_project "$(submitted_file)" || find_project "$(readlink -f -- "$0")"
if [ ! -f "${TOOLKIT_HOME:-}/jobs/common.sh" ]; then
    echo "error: the project is not at ${TOOLKIT_HOME:-${SLURM_SUBMIT_DIR:-$PWD} or above}" >&2
    echo "  Submit from the project's folder, or set TOOLKIT_HOME to it." >&2
    exit 2
fi
# shellcheck source=../common.sh
. "$TOOLKIT_HOME/jobs/common.sh"

# Set STEP to what starts the processes on all nodes.
compose_step() {
    local gpus=${SLURM_GPUS_ON_NODE:-0} nodes=${SLURM_NNODES:-1} tasks=${SLURM_NTASKS:-1} others
    STEP=(env TOOLKIT_TASK=1 bash "$TOOLKIT_HOME/jobs/distributed/node.sh" "$@")
    if [ -z "${SLURM_JOB_ID:-}" ] || dry_run; then
        return 0
    fi
    if [ "$tasks" -le "$nodes" ]; then
        tasks=$nodes
        # What was asked for the job as a whole would be asked for the step, too.
        unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_TASKS_PER_NODE \
            SLURM_CPUS_PER_TASK SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK \
            SLURM_GPU_BIND SLURM_TRES_PER_TASK
        STEP=(--ntasks-per-node=1 --cpu-bind=none "${STEP[@]}")
    else
        [ -z "${SLURM_CPUS_PER_TASK:-}" ] ||
            STEP=(--cpus-per-task="$SLURM_CPUS_PER_TASK" "${STEP[@]}")
        [ -z "${SLURM_GPUS_PER_TASK:-}" ] || gpus=0
        others=${TOOLKIT_CPU_BIND:-}
        others=${others//[^,]/}
        [ -z "${TOOLKIT_CPU_BIND:-}" ] || [ "$tasks" != $((nodes * (${#others} + 1))) ] ||
            STEP=(--cpu-bind="$TOOLKIT_CPU_BIND" "${STEP[@]}")
    fi
    [ "$gpus" = 0 ] || STEP=(--gres="gpu:$gpus" "${STEP[@]}")
    # The first process that fails ends the others.
    STEP=(srun --quiet --export=ALL --nodes="$nodes" --ntasks="$tasks" --kill-on-bad-exit=1
        "${STEP[@]}")
}

# Set MASTER_ADDR and MASTER_PORT to where the processes find each other: this, the first node.
find_master() {
    local first
    MASTER_ADDR=127.0.0.1
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        first=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | head -n 1)
        # Its name need not be one that can be looked up.
        MASTER_ADDR=$(timeout 30 scontrol show node "$first" | sed -n 's/.*NodeAddr=\(\S*\).*/\1/p')
        MASTER_ADDR=${MASTER_ADDR:-$first}
    fi
    MASTER_PORT=$(free_port)
}

# Instead of the signal, which srun would give to every process of the step, also to those that
# it would end: each node's script tells its own.
# shellcheck disable=SC2329  # signals.sh calls it
warn() { : >"$FAILURES/warned"; }

# All processes read and write the same folder of results, so it is not copied.
begin_job direct
[[ ${PROCESSES:-0} =~ ^[0-9]+$ ]] || fail "PROCESSES is $PROCESSES, it must be a whole number"
compose_step "$@"
if dry_run; then
    "${STEP[@]}"
    exit
fi
find_master
find_apptainer
find_image
record running
FAILURES=$RESULTS/.failures
remove "$FAILURES"
mkdir -- "$FAILURES" || fail "cannot write in $RESULTS"
export TOOLKIT_HOME IMAGE RESULTS FAILURES MASTER_ADDR MASTER_PORT
printf 'job %s on %s: processes meet at %s:%s\n' "$JOB_ID" "${SLURM_JOB_NODELIST:-$(hostname)}" \
    "$MASTER_ADDR" "$MASTER_PORT" >&2
supervise "${STEP[@]}"
status=$?
# By the times at which the processes noticed: the others die of that.
first=$(cat "$FAILURES"/rank-* 2>/dev/null | LC_ALL=C sort -k 1,1n -k 3,3n | head -n 1)
if [ -n "$first" ]; then
    read -r _ status rank node <<<"$first"
    printf 'error: rank %s on %s failed first, with exit status %s\n' "$rank" "$node" "$status" >&2
    sed 's/^/  /' "$FAILURES/why-$rank" >&2
elif [ "$status" = 0 ] && [ -e "$FAILURES/again" ]; then
    status=85
fi
remove "$FAILURES"
exit "$status"
