#!/bin/bash
# Run a program of one's own in the image, with its arguments.
#
#   sbatch jobs/train/job.sh train.py --epochs 5            on a cluster, as it is
#   toolkit submit train -- --time=2:00:00 train.py --epochs 5
#                                                           with the options of a site
#   bash jobs/train/job.sh train.py --epochs 5              on this machine, without Slurm
#
# Its arguments are the program and what the program takes. A file *.py is run by python3, a
# file *.sh by bash; what is no file is a program of the image, such as `python3 -m package`.
# In the container the folder of the script is /code, read-only; the program starts in /results,
# and what it writes there comes back. Data are named in INPUT. It reads, beside what every job
# reads:
#
#   CODE                   folder to be /code, in which the script is; by default the script's
#
# Before the program --device rocm|cuda|hpu|cpu names the device, as TOOLKIT_DEVICE does.
# Before the time limit the program gets the signal USR1 if it handles that. A job that is
# queued again finds in /results what it wrote there before.
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --gres=gpu:1
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

# What follows the program is the program's.
case ${1:-} in
    --device) take_device "${@:1:2}" && shift 2 ;;
    --device=*) take_device "$1" && shift ;;
esac
begin_job
own_program "$@"
start_in /results
run_in_container "${PROGRAM[@]}"
