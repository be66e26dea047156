#!/bin/bash
# Build an image on a compute node, where some clusters have Apptainer and others their memory.
#
#   sbatch jobs/build/job.sh monai --base SIF               on a cluster, as it is
#   toolkit submit build -- monai --base SIF                with the options of a site
#   bash jobs/build/job.sh monai                            on this machine, without Slurm
#
# Its arguments are those of `toolkit build`, whose exit status it has. The image goes where
# that puts it, by default to the project's build/. It takes no GPU. The project's .venv
# (`make venv`) must be on a file system that the nodes see, and packages come from the network:
# where compute nodes have none, pip's settings name a folder of wheels.
#SBATCH --job-name=build
#SBATCH --nodes=1
#SBATCH --time=01:00:00
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

[ $# != 0 ] || fail "no image to build" "Name one, as in: toolkit submit build -- monai"
PYTHON=$TOOLKIT_HOME/.venv/bin/python
if dry_run; then
    printf '%q ' "$PYTHON" -I -m toolkit build "$@"
    printf '\n'
    exit 0
fi
IMAGE=''
begin_job
[ -x "$PYTHON" ] || fail "no $TOOLKIT_HOME/.venv on $(hostname), which builds the image" \
    "Run \`make venv\` in $TOOLKIT_HOME, on a file system that the nodes see."
"$PYTHON" -I -c 'import toolkit' || fail "$PYTHON does not start on $(hostname)" \
    "Run \`make venv PYTHON=...\` in $TOOLKIT_HOME with a Python that the nodes have, too."
find_apptainer
# What Apptainer, pip and their like put into the home goes away with the job.
export HOME=$WORK/home TOOLKIT_HOME TOOLKIT_APPTAINER=$APPTAINER
export TOOLKIT_TMPDIR=${TOOLKIT_TMPDIR:-$WORK/tmp} TMPDIR=$WORK/tmp
supervise "$PYTHON" -I -m toolkit build "$@"
