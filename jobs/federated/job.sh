#!/bin/bash
# Run a federated experiment on MedMNIST: director, envoys and driver in one job, which ends.
#
#   toolkit data fetch bloodmnist --to "$DATA"              once, where there is internet
#   toolkit submit federated --envoys 4 --rounds 10 --dataset bloodmnist
#                                                           with the options of a site
#   toolkit submit federated --envoys 4 -- --nodes=2        the envoys spread over two nodes
#   sbatch jobs/federated/job.sh --envoys 4 --rounds 10     on a cluster, as it is
#   bash jobs/federated/job.sh --envoys 2 --rounds 3        on this machine, without Slurm
#
# Its options, which docs/federated.md describes:
#
#   --rounds N             times that the envoys train and their weights are averaged (10)
#   --envoys N             how many take part (2)
#   --dataset NAME         a set of MedMNIST 2D, such as pathmnist or bloodmnist_64; by default the
#                          one whose file FEDERATED_DATA names, else bloodmnist
#   --split HOW            iid, label-skew, or your own shard descriptor, FILE.py:CALLABLE
#   --alpha A              of label-skew: the smaller, the more uneven (0.5)
#   --model NAME           cnn, a network of MONAI's such as DenseNet121, or your own,
#                          FILE.py:CALLABLE, or package.module:CALLABLE in CODE; so for --split
#   --epochs N             passes of an envoy over its data in a round (1)
#   --batch N              images of a step (64)
#   --rate R               learning rate (0.001)
#   --momentum M           of SGD (0.9)
#   --seed N               of weights, shards and order (0)
#   --device NAME          auto, rocm, cuda, hpu or cpu; each node by itself takes what it has
#   --tolerate N           envoys that may be lost before the job fails (0)
#   --patience SECONDS     without a sign of life until an envoy is lost (20)
#   --stall SECONDS        without anything new until the job fails (900)
#   --restarts N           how often an envoy that has died is started again (0)
#   --port N               of the director, and the next one; by default free ones
#   --no-baselines         do not compare with each envoy alone and all data at once
#   --record               keep the weights of every envoy and round, to compute the means again
#
# It reads, beside what every job reads:
#
#   FEDERATED_DATA         the set's file, or the folder that has it; by default TOOLKIT_DATA,
#                          else $DATA, else data/ in the project
#   FEDERATED_OPTIONS      options before the arguments
#   CODE                   folder with your own Python, /code in the container: where modules are
#                          looked for; by default that of the file that --model or --split names
#
# It uses build/openfl.sif if IMAGE names no other. It ends with 0 only when every round was
# aggregated and the last aggregate is saved. A minute and a half before the time limit it ends,
# and is queued again to go on after the last aggregate; REQUEUE=0 leaves it at that. The same
# call with RESULTS set to the folder of an ended run goes on with that, too.
#SBATCH --job-name=federated
#SBATCH --nodes=1
#SBATCH --gres=gpu:1
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@90
#SBATCH --requeue
#SBATCH --no-kill
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

# The image of this job, by its name in the catalogue.
# shellcheck disable=SC2034  # find_image reads it
DEFAULT_IMAGE=openfl

# Set ENVOYS, DATASET and TOOLKIT_DEVICE to what the arguments say, and ARGUMENTS to those for
# the program: files of the user's are elsewhere in the container.
read_arguments() {
    local name value known
    # Those that the comment above tells: the program has others, which are not for users.
    known=$(sed -n '/^#SBATCH/q; s/^#   \(--[a-z-]*\) .*/\1/p' "$0")
    ENVOYS=2 DATASET='' ARGUMENTS=()
    while [ $# -gt 0 ]; do
        name=${1%%=*}
        case $1 in
            --no-baselines | --record)
                ARGUMENTS+=("$1")
                shift
                continue
                ;;
            --help | -h)
                sed '1d; /^#SBATCH/,$d; s/^# \{0,1\}//' "$0"
                exit
                ;;
            --resume | --resume=* | --results | --results=* | --data | --data=*)
                fail "${1%%=*} is set by the job" \
                    "Name the folder for results in RESULTS, and the data in FEDERATED_DATA."
                ;;
        esac
        grep -qxFe "$name" <<<"$known"$'\n--engine' ||
            fail "$name is not an option of this job" "\`toolkit jobs show federated\` tells them."
        if [[ $1 == *=* ]]; then
            value=${1#*=} && shift
        else
            [ $# -gt 1 ] || fail "the option $1 lacks its value"
            value=$2 && shift 2
        fi
        case $name in
            --envoys) ENVOYS=$value ;;
            --dataset) DATASET=$value ;;
            --device)
                export TOOLKIT_DEVICE="${value#auto}"
                continue
                ;;
            --model | --split) [[ $value != *.py:* ]] || own_code "$value" ;;
        esac
        ARGUMENTS+=("$name" "$value")
    done
    [[ $ENVOYS =~ ^[1-9][0-9]{0,2}$ ]] || fail "--envoys is $ENVOYS, it must be a whole number"
}

# Set CODE to its full path, if there is any.
find_code() {
    [ -n "${CODE:-}" ] || return 0
    [ -d "$CODE" ] || fail "CODE is $CODE: there is no such folder on $(hostname)"
    CODE=$(readlink -f -- "$CODE")
    check_bound "$CODE"
}

# Have the container see a file of the user's, FILE.py:CALLABLE, and set value to where.
own_code() {
    local file=${1%%.py:*}.py real
    [ -f "$file" ] || fail "no file $file in $PWD"
    real=$(readlink -f -- "$file")
    CODE=${CODE:-${real%/*}}
    find_code
    [[ $real == "$CODE"/* ]] || fail "$file is not below CODE, which is $CODE"
    value=/code/${real#"$CODE"/}:${1##*.py:}
}

# Set PLACE to the file of the set.
find_data() {
    local given=${FEDERATED_DATA:-${TOOLKIT_DATA:-${DATA:-$TOOLKIT_HOME/data}}} name
    PLACE=$(expand "$given" "${SLURM_JOB_ID:-}") ||
        fail "the folder for data, $given, cannot be expanded on $(hostname)"
    [[ $PLACE == /* ]] || PLACE=$PWD/$PLACE
    if [ ! -d "$PLACE" ] && [[ $PLACE == *.npz ]]; then
        name=${PLACE##*/}
        [ "$name" = "${DATASET:=${name%.npz}}.npz" ] ||
            fail "--dataset is $DATASET, but the data are $PLACE" \
                "Leave --dataset out, or name the folder that has $DATASET.npz in FEDERATED_DATA."
    else
        PLACE=${PLACE%/}/${DATASET:=bloodmnist}.npz
    fi
    check_bound "$PLACE"
    [ -e "$PLACE" ] || dry_run || fail "no data at $PLACE on $(hostname)" \
        "Fetch them with \`toolkit data fetch $DATASET --to DIR\` and set FEDERATED_DATA to that folder."
}

# End the job if another one on this host has the same results: they would write over each
# other's files. Those of Slurm are found out by begin_job on all hosts.
lock_results() {
    local lock
    [ -n "${RESULTS:-}" ] && ! dry_run && mkdir -p -- "$RESULTS" 2>/dev/null || return 0
    # It is held until the last of this job's processes has ended.
    { exec {lock}<"$RESULTS"; } 2>/dev/null || return 0
    flock --nonblock --conflict-exit-code 3 "$lock" 2>/dev/null || [ $? != 3 ] ||
        fail "another job is still writing to $RESULTS" "Name another folder in RESULTS."
}

# Should this script be killed, end the program in its place, bring home what that has made, and
# remove the keys: without Slurm nobody else does.
outlive() {
    [ -z "${SLURM_JOB_ID:-}" ] && ! dry_run || return 0
    set -m
    (
        trap '' HUP INT TERM USR1 USR2
        started=()
        while read -r _ _ _ parent _ <"/proc/$BASHPID/stat" && [ "$parent" = $$ ]; do
            read -r -a found < <(children_of $$)
            # None, not even this one, if it has just been killed.
            [ ${#found[@]} = 0 ] || started=("${found[@]}")
            sleep 1
        done
        echo "error: the job's script was killed: the job ends" >&2
        limit=$((SECONDS + 30))
        end_group "$SYNCING"
        for child in "${started[@]}"; do
            [ "$child" = "$BASHPID" ] || kill -s TERM -- "$child" 2>/dev/null
        done
        for child in "${started[@]}"; do
            [ "$child" != "$BASHPID" ] || continue
            while ((SECONDS < limit)) && kill -s 0 -- "$child" 2>/dev/null; do sleep 0.2; done
            kill -s KILL -- "-$child" 2>/dev/null
        done
        # What it held in scratch, to leave it.
        [ -z "${INPUT:-}" ] || enter_node
        (exit 137)
        end_job
    ) </dev/null &
    HELPERS+=($!)
    set +m
}

# Bind what the parties on every node read.
bind_inputs() {
    BINDS+=("$PLACE:/data/${PLACE##*/}:ro")
    [ -z "${CODE:-}" ] || BINDS+=("$CODE:/code:ro")
}

# Set ADDRESS to where the other nodes find this one, the first.
find_address() {
    local first
    first=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | head -n 1)
    # Its name need not be one that can be looked up.
    ADDRESS=$(timeout 30 scontrol show node "$first" | sed -n 's/.*NodeAddr=\(\S*\).*/\1/p')
    ADDRESS=${ADDRESS:-$first}
}

# Start the envoys on all nodes. One that fails is the driver's to judge, which hears of it by a
# file: not to end the others.
start_envoys() {
    local gpus=${SLURM_GPUS_ON_NODE:-0} nodes=${SLURM_NNODES:-1}
    local -a step
    [ "$nodes" -le "$ENVOYS" ] || nodes=$ENVOYS
    step=(srun --quiet --export=ALL --nodes="$nodes" --ntasks="$ENVOYS" --distribution=cyclic
        --overcommit --cpu-bind=none --kill-on-bad-exit=0 --wait=0 --no-kill)
    [ "$gpus" = 0 ] || step+=(--gres="gpu:$gpus")
    export TOOLKIT_HOME IMAGE RESULTS FEDERATION PLACE CODE="${CODE:-}"
    export ENVOYS_HERE=$(((ENVOYS + nodes - 1) / nodes))  # on a node
    set -m
    (
        # What was asked for the job as a whole would be asked for the step, too.
        unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_TASKS_PER_NODE \
            SLURM_CPUS_PER_TASK SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK \
            SLURM_GPU_BIND SLURM_TRES_PER_TASK
        "${step[@]}" env TOOLKIT_TASK=1 bash "$TOOLKIT_HOME/jobs/federated/node.sh"
        for ((number = 1; number <= ENVOYS; number++)); do
            [ -e "$FEDERATION/ended-envoy-$number" ] || echo 1 >"$FEDERATION/ended-envoy-$number"
        done 2>/dev/null
    ) </dev/null &
    STEP=$!
    set +m
}

# Wait for the envoys, which end when the driver has, and remove what they were told.
end_envoys() {
    # In steps of 0.2 s. Envoys that are killed leave their scratch, and nodes may be busy.
    local left=300
    # Slurm gives a job that is to end little time, and has asked the envoys itself.
    [ "$ASKED" = 0 ] || { remove "$FEDERATION"; left=75; }
    [ ! -d "$FEDERATION" ] || [ -e "$FEDERATION/over" ] || echo stop >"$FEDERATION/over"
    while ((left-- > 0)) && kill -s 0 -- "-$STEP" 2>/dev/null; do sleep 0.2; done
    kill -s TERM -- "-$STEP" 2>/dev/null && sleep 2
    end_group "$STEP"
    remove "$FEDERATION"
}

: "${REQUEUE:=1}"
# shellcheck disable=SC2086  # several options
read_arguments ${FEDERATED_OPTIONS:-} "$@"
find_code
find_data
find_device
bind_inputs
lock_results
PROGRAM=(python3 "$JOBS/federated/run.py" all --data "/data/${PLACE##*/}" --results /results --resume
    --device "$DEVICE")
if [ "${SLURM_NNODES:-1}" -le 1 ] || dry_run; then
    begin_job
    outlive
    run_in_container "${PROGRAM[@]}" "${ARGUMENTS[@]}"
    exit
fi
# All nodes read and write the same folder of results.
begin_job direct
find_apptainer
find_image
find_address
FEDERATION=$RESULTS/.federation
remove "$FEDERATION"
mkdir -m 700 -- "$FEDERATION" || fail "cannot write in $RESULTS"
BINDS+=("$FEDERATION:/federation")
start_envoys
run_in_container "${PROGRAM[@]}" --shared /federation --host "$ADDRESS" "${ARGUMENTS[@]}"
status=$?
end_envoys
exit "$status"
