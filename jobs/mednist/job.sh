#!/bin/bash
# Train MONAI's DenseNet121 on MedNIST, test it, and write metrics, curves and a report.
#
#   toolkit data fetch mednist --to "$DATA"            once, where there is internet
#   sbatch jobs/mednist/job.sh                         on a cluster, as it is
#   sbatch jobs/mednist/job.sh --preset fast           with options for the training
#   toolkit submit mednist --site SITE --preset fast   with the options of a site, too
#   bash jobs/mednist/job.sh --epochs 1                on this machine, without Slurm
#
# Its options, which docs/mednist.md describes; the preset says what those without a default are:
#
#   --preset seed|fast       the cluster's own recipe, or one for fewer steps (seed)
#   --epochs N               passes over the data
#   --batch N                images of a step, on all devices together
#   --rate R                 learning rate; the highest, if it changes
#   --schedule HOW           of the learning rate: constant or onecycle
#   --optimizer adam|adamw   what changes the weights
#   --decay D                weight decay of adamw
#   --augment                rotate, flip and zoom images at random
#   --no-augment             take them as they are
#   --precision NAME         auto, fp32 or bf16 (auto)
#   --device NAME            auto, rocm, cuda, hpu or cpu; by default what the node has
#   --seed N                 of split, weights, order and augmentation (0)
#   --checkpoint-minutes M   between checkpoints within an epoch (10)
#   --workers N              processes that decode (as many as CPUs)
#
# It reads, beside what every job reads:
#
#   MEDNIST_DATA           MedNIST.tar.gz, or a folder that has it or MedNIST/ in it; by default
#                          TOOLKIT_DATA, else $DATA, else data/ in the project
#   MEDNIST_OPTIONS        options for the training, before the arguments
#
# A minute and a half before the time limit it saves its state, ends, and is queued again to go
# on; REQUEUE=0 leaves it at the first. The same call with RESULTS set to the folder of an ended
# run goes on with that, too.
#SBATCH --job-name=mednist
#SBATCH --nodes=1
#SBATCH --gres=gpu:1
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@90
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

# Set PLACE to the archive or the folder of classes, where data.py would look for them.
find_data() {
    local given=${MEDNIST_DATA:-${TOOLKIT_DATA:-${DATA:-$TOOLKIT_HOME/data}}} name
    PLACE=$(expand "$given" "${SLURM_JOB_ID:-}") ||
        fail "the folder for data, $given, cannot be expanded on $(hostname)"
    [[ $PLACE == /* ]] || PLACE=$PWD/$PLACE
    PLACE=${PLACE%/}
    [ ! -f "$PLACE" ] || return 0
    for name in {,mednist/}{MedNIST.tar.gz,MedNIST}; do
        [ ! -e "$PLACE/$name" ] || { PLACE=$PLACE/$name && return; }
    done
    for name in AbdomenCT BreastMRI CXR ChestCT Hand HeadCT; do
        [ ! -d "$PLACE/$name" ] || return 0
    done
    ! dry_run || return 0
    for name in {,mednist/}{MedNIST.tar.gz,MedNIST}; do
        [ ! -L "$PLACE/$name" ] || fail "$PLACE/$name leads to nothing on $(hostname)" \
            "It is a link to $(readlink -- "$PLACE/$name"), which must be on all nodes."
    done
    given="no data at $PLACE on $(hostname)"
    [ ! -e "$PLACE" ] || given+=": neither MedNIST.tar.gz nor a folder MedNIST is there"
    fail "$given" \
        "Fetch them with \`toolkit data fetch mednist --to DIR\` and set MEDNIST_DATA to that folder."
}

# Have a file or a folder at hand in the container as /data/NAME. In a folder of data it may be a
# link, which would lead to nothing there.
bind_data() {
    local real
    real=$(readlink -f -- "$1")
    check_bound "$real"
    check_bound "$2"
    BINDS+=("$real:/data/$2:ro")
}

# End the job if its arguments set what the job itself sets; they may be abbreviated.
no_places() {
    local word
    for word in "$@"; do
        case $word in
            --da* | --ca* | --resul* | --resum*)
                fail "${word%%=*} is set by the job" \
                    "Name the folder for the results in RESULTS, and the data in MEDNIST_DATA."
                ;;
        esac
    done
}

: "${REQUEUE:=1}"
# shellcheck disable=SC2086  # several options
take_device ${MEDNIST_OPTIONS:-} "$@"
no_places "${ARGUMENTS[@]}"
find_data
find_device
# Read where it is: it is read once, and what is decoded lies in scratch.
bind_data "$PLACE" "${PLACE##*/}"
for place in "$PLACE" "$(readlink -f -- "$PLACE")"; do
    if [ -e "${place%/*}/MedNIST.manifest.json" ]; then
        bind_data "${place%/*}/MedNIST.manifest.json" MedNIST.manifest.json
        break
    fi
done
# For messages. Not with a comma, at which Apptainer would split it.
[[ $PLACE == *,* ]] || VARIABLES+=("MEDNIST_FOLDER=${PLACE%/*}")
run_in_container python3 "$JOBS/mednist/train.py" --data "/data/${PLACE##*/}" \
    --results /results --cache /tmp/mednist --device "$DEVICE" --resume "${ARGUMENTS[@]}"
