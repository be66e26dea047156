#!/bin/bash
# Print MONAI's own report of its version, its packages and the devices.
#
#   sbatch jobs/monai_check/job.sh                     on a cluster, as it is
#   toolkit submit monai_check --site SITE             with the options of a site
#   IMAGE=some.sif bash jobs/monai_check/job.sh        on this machine, without Slurm
#
# It takes --device rocm|cuda|hpu|cpu, and no other arguments. Nothing is installed: MONAI is in
# the image.
#SBATCH --job-name=monai_check
#SBATCH --nodes=1
#SBATCH --gres=gpu:1
#SBATCH --time=00:05:00

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

take_device "$@"
no_arguments "${ARGUMENTS[@]}"
run_in_container python3 -m monai.config.deviceconfig
