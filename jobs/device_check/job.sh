#!/bin/bash
# Check the devices of every node of the job and print one report that names the odd node out.
#
#   sbatch --nodes=4 jobs/device_check/job.sh                   on a cluster, as it is
#   toolkit submit device_check --site SITE -- --nodes=4        with the options of a site
#   bash jobs/device_check/job.sh                               on this machine, without Slurm
#
# It takes no arguments and whole nodes. It reads, beside what every job reads:
#
#   DEVICE_CHECK_OPTIONS   options for `toolkit check`, such as "--rocm --expect 8"; %n in
#                          them is the node's name
#   DEVICE_CHECK_SECONDS   time for the check of a node, by default 240
#   DEVICE_CHECK_RESULTS   folder in which it makes its own for the results; by default the
#                          one that the job was submitted from
#
# The check runs on the nodes by the project's .venv (`make venv`), which they must see. It
# looks into the image, too, if there is one. The exit status is 0 if every node has told and
# none has failed, else 1.
#SBATCH --job-name=device_check
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --time=00:10:00

# shellcheck disable=SC2031  # nothing of a subshell is wanted here

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

no_arguments "$@"

# Set IMAGE to the image, or to nothing if there is none and none was asked for.
find_optional_image() {
    if [ -n "${IMAGE:-${TOOLKIT_IMAGE:-}}" ] || (find_image) 2>/dev/null; then
        find_image
    else
        IMAGE=''
        dry_run || echo "no image build/monai.sif: only the hosts are checked" >&2
    fi
}

# Set STEP to what runs the check once on every node.
compose_step() {
    local gpus
    STEP=(bash "$TOOLKIT_HOME/jobs/device_check/node.sh")
    [ -n "${SLURM_JOB_ID:-}" ] || return 0
    # A step has only those GPUs of whole nodes that it asks for itself, and as many on each:
    # what the job has on this node, or what the node with the fewest has.
    gpus=$({
        echo "${SLURM_GPUS_ON_NODE:-0}"
        timeout 30 sinfo --noheader --Node --nodes="${SLURM_JOB_NODELIST:-}" --format=%G |
            sed 's/.*gpu:\([^:,(]*:\)\?\([0-9]\+\).*/\2/; t; s/.*/0/'
    } 2>/dev/null | sort -n | head -n 1)
    [ "$gpus" = "${SLURM_GPUS_ON_NODE:-0}" ] || printf \
        'warning: the nodes have not as many GPUs each: %s are checked on each\n' "$gpus" >&2
    [ "$gpus" != 0 ] || gpus=''
    # One node's trouble is not to end the others' check, nor the wait for the slowest.
    STEP=(srun --quiet --export=ALL --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0
        --wait=0 --no-kill ${gpus:+--gres="gpu:$gpus"} "${STEP[@]}")
    # What the site asked for the job as a whole would be asked for the step, too.
    unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_TASKS_PER_NODE \
        SLURM_CPUS_PER_TASK SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK \
        SLURM_GPU_BIND SLURM_TRES_PER_TASK
}

# Make the folder for the results and set RESULTS to it.
make_results() {
    local name
    name=$(date +%Y%m%d-%H%M%S)-$$
    [ -z "${SLURM_JOB_ID:-}" ] || name=$SLURM_JOB_ID$(is_batch || echo "-$name")
    RESULTS=${DEVICE_CHECK_RESULTS:-$PWD}
    [[ $RESULTS == /* ]] || RESULTS=$PWD/$RESULTS
    # A job that was queued again must not read what its first run left.
    RESULTS+=/device_check-$name${SLURM_RESTART_COUNT:+-$SLURM_RESTART_COUNT}
    { mkdir -p -- "${RESULTS%/*}" && mkdir -- "$RESULTS"; } ||
        fail "cannot make the folder $RESULTS on $(hostname)" \
            "Name one that all nodes see and this user can write in DEVICE_CHECK_RESULTS."
}

load_modules
find_optional_image
SECONDS_EACH=${DEVICE_CHECK_SECONDS:-240}
[[ $SECONDS_EACH =~ ^[1-9][0-9]*$ ]] ||
    fail "DEVICE_CHECK_SECONDS is $SECONDS_EACH, it must be a whole number"
compose_step
if dry_run; then
    printf '%q ' "${STEP[@]}"
    printf '\n'
    exit 0
fi
PYTHON=$TOOLKIT_HOME/.venv/bin/python
[ -x "$PYTHON" ] || fail "no $TOOLKIT_HOME/.venv on $(hostname), which runs the check" \
    "Run \`make venv\` in $TOOLKIT_HOME, on a file system that the nodes see."
"$PYTHON" -I -c 'import toolkit' || fail "$PYTHON does not start on $(hostname)" \
    "Run \`make venv PYTHON=...\` in $TOOLKIT_HOME with a Python that the nodes have, too."
if [ -n "${SLURM_JOB_ID:-}" ]; then
    NODES=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}") ||
        fail "scontrol does not tell the nodes of job $SLURM_JOB_ID"
else
    NODES=$(hostname -s)
fi
make_results
echo "results in $RESULTS" >&2

export RESULTS TOOLKIT_HOME IMAGE SECONDS_EACH
# A node that is gone keeps srun waiting for ever.
timeout --kill-after=20 $((SECONDS_EACH + 60)) "${STEP[@]}" ||
    echo "warning: the step ended with exit status $?; see below for each node" >&2
# shellcheck disable=SC2086  # one word a node
"$PYTHON" -I -m toolkit.checks.gather "$RESULTS" $NODES
