#!/bin/bash
# Run JupyterLab in the image on a compute node, and print how to reach it.
#
#   sbatch jobs/jupyter/job.sh                              on a cluster, as it is
#   toolkit submit jupyter -- --time=4:00:00                with the options of a site
#   bash jobs/jupyter/job.sh                                on this machine, without Slurm
#
# It takes no arguments. The log says which ssh command to run on one's own computer and which
# address to open there. The server listens on the node's loopback only and wants the token
# that the address holds; the log is made readable for its owner alone. It reads, beside what
# every job reads:
#
#   NOTEBOOKS              folder with the notebooks, read and written as it is; by default
#                          /results, which comes back when the job ends
#   JUPYTER_PORT           port on the node and here; by default a free one
#   JUPYTER_LOGIN          login node to go through; by default the one of the submission
#
# The image must hold JupyterLab:
#
#   toolkit build monai --with jupyterlab --output build/lab.sif
#   toolkit submit jupyter --image build/lab.sif
#SBATCH --job-name=jupyter
#SBATCH --nodes=1
#SBATCH --gres=gpu:1
#SBATCH --time=02:00:00
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

no_arguments "$@"
begin_job
start_in /results
if [ -n "${NOTEBOOKS:-}" ]; then
    [[ $NOTEBOOKS == /* ]] || NOTEBOOKS=$PWD/$NOTEBOOKS
    [ -d "$NOTEBOOKS" ] || fail "no folder $NOTEBOOKS on $(hostname)" "Name another in NOTEBOOKS."
    check_bound "$NOTEBOOKS"
    BINDS+=("$NOTEBOOKS:/notebooks")
    start_in /notebooks
fi
if ! dry_run; then
    port=${JUPYTER_PORT:-$(free_port)}
    token=$(head -c 24 /dev/urandom | od -An -vtx1 | tr -d ' \n')
    # The log, too, is to be read by nobody else: it tells the token.
    # Regular files only, and those of this shell, not of chmod with its own redirections: root
    # would take /dev/null or a terminal away from everybody.
    for fd in 1 2; do
        [ ! -f "/proc/$$/fd/$fd" ] || chmod go-rwx -- "/proc/$$/fd/$fd" 2>/dev/null
    done
    # Neither in a command line nor in the environment, which others may see.
    (umask 077 && printf '%s %s\n' "$port" "$token" >"$WORK/home/server")
    here=$(id -un)@$(hostname)
    through=${SLURM_JOB_ID:+-J $(id -un)@${JUPYTER_LOGIN:-${SLURM_SUBMIT_HOST:-LOGIN_NODE}} }
    printf '%s\n' "JupyterLab will be on $(hostname). On your own computer run" "" \
        "  ssh -N -L $port:127.0.0.1:$port $through$here" "" "and open there" "" \
        "  http://127.0.0.1:$port/lab?token=$token" "" \
        "Shut it down in its menu File${SLURM_JOB_ID:+, or by: scancel $SLURM_JOB_ID}."
fi
run_in_container python3 "$JOBS/jupyter/server.py"
