# shellcheck shell=bash
# Every job reads these variables; none must be set:
#
#   IMAGE, TOOLKIT_IMAGE   SIF to use; by default monai.sif in the project's build/
#   TOOLKIT_HOME           the project; found from where the job was submitted
#   TOOLKIT_RESULTS        folder in which each job makes its own, NAME-JOBID, for its results;
#                          by default results/ below the folder that the job was submitted from.
#                          job.json in it is the job's record, and no name for a program's file
#   RESULTS                that folder itself; the job goes on with what is there
#   INPUT                  files and folders, by commas, that are copied to the node's scratch
#                          first; in the container they are /input/NAME
#   TOOLKIT_APPTAINER      program that runs containers; else apptainer or singularity
#                          on the PATH, else the project's own in .tools/
#   TOOLKIT_DEVICE         rocm, cuda, hpu or cpu; by default what the node's device
#                          files say
#   PT_HPU_LAZY_MODE       of Gaudi: 1 for lazy mode, 0 (the default) for eager mode
#   TOOLKIT_SCRATCH        node-local folder for what the job writes, removed after it;
#                          by default ${TMPDIR:-/tmp}; shell variables in it are expanded
#   TOOLKIT_SCRATCH_GB     how much of it the job may use for its input, and for results that are
#                          there already; by default what is free
#   TOOLKIT_STAGE_CHECK    hash: compare copied input by contents; size (the default): by sizes
#   TOOLKIT_SYNC           seconds between copies of the results while the job runs, by default
#                          600; 0 for none. They are copied at its end anyway
#   TOOLKIT_DATA           the user's folder for large files; by default $DATA
#   TOOLKIT_CACHE          folder that keeps compiled kernels for the user's next job; by
#                          default in TOOLKIT_DATA, else beside the results; none: nothing is kept
#   TOOLKIT_CACHE_GB       how much is kept at most, by default 2
#   TOOLKIT_BINDS          folders for the container, SOURCE[:DESTINATION[:ro]], by commas
#   TOOLKIT_MODULES        environment modules to load first, such as apptainer
#   TOOLKIT_PASS           names of further variables that the container shall see, by blanks or
#                          commas; it sees SLURM_*, OMP_NUM_THREADS and those that choose devices
#                          anyway
#   TOOLKIT_DRY_RUN        if 1, print the container's command line and do nothing
#   REQUEUE                if 1, a program that ends with exit status 85, which says that it has
#                          saved its state and wants to go on, is queued again
#
# The container sees neither the user's home nor the environment of the submitting shell.

# What the job scripts share. A job script finds the project, sources this file and calls
# run_in_container; `toolkit submit` sets the variables above from the site's file.

# Where the project's jobs/ is inside the container.
# shellcheck disable=SC2034  # for the job scripts
JOBS=/toolkit/jobs

# Further SOURCE:DESTINATION[:ro] for the container, and NAME=VALUE for the program's environment.
BINDS=()
VARIABLES=()

STARTED=''

# The folder in the container that the program starts in; start_in names another.
FOLDER=/home/job
start_in() { FOLDER=$1; }

# Say what failed and what to do about it, and end the job: the call was wrong.
fail() {
    printf 'error: %s\n' "$1" >&2
    [ -z "${2:-}" ] || printf '  %s\n' "$2" >&2
    exit 2
}

# End the job if the container cannot be given a file or folder, with a hint.
check_bound() { [[ $1 != *[:,]* ]] || fail "$1: Apptainer binds no names with : or ," "${2:-}"; }

dry_run() { [ "${TOOLKIT_DRY_RUN:-}" = 1 ]; }

# End the job if it was given arguments, which would otherwise be ignored in silence.
no_arguments() {
    [ $# -eq 0 ] || fail "this job takes no arguments: $*" "Options of sbatch go before the script."
}

# Take --device D out of a job's arguments, for TOOLKIT_DEVICE; ARGUMENTS is what is left of them.
take_device() {
    ARGUMENTS=()
    while [ $# != 0 ]; do
        case $1 in
            --device)
                [ $# -gt 1 ] || fail "--device has no value" "It is rocm, cuda, hpu, cpu or auto."
                TOOLKIT_DEVICE=$2
                shift
                ;;
            --device=*) TOOLKIT_DEVICE=${1#*=} ;;
            *) ARGUMENTS+=("$1") ;;
        esac
        shift
    done
}

# Set PROGRAM to how the user's own program is run in the container, which sees the folder of
# its script, or CODE, as /code.
own_program() {
    local script code
    [ $# != 0 ] || fail "no program to run" "Name it and its arguments after the job's script."
    PROGRAM=("$@")
    if [ ! -f "$1" ]; then
        # Not one of the image's, by its looks.
        [[ $1 != */* && $1 != *.py && $1 != *.sh ]] || fail "no script $1 in $PWD" \
            "Submit from the folder that its path starts in, or name it by its full path."
        return 0
    fi
    script=$(readlink -f -- "$1")
    code=$(readlink -f -- "${CODE:-${script%/*}}")
    [[ $script == "$code"/* ]] || fail "the script $script is not below CODE, which is $code"
    check_bound "$code"
    BINDS+=("$code:/code:ro")
    PROGRAM[0]=/code/${script#"$code"/}
    case $script in
        *.py) PROGRAM=(python3 "${PROGRAM[@]}") ;;
        *.sh) PROGRAM=(bash "${PROGRAM[@]}") ;;
    esac
}

# Print a port that nothing on this host uses, below those that programs get by themselves.
free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 12000))
        grep -qsi ":$(printf %04x "$port") " /proc/net/tcp /proc/net/tcp6 || break
    done
    echo "$port"
}

# shellcheck source=common/signals.sh
. "${BASH_SOURCE[0]%/*}/common/signals.sh"
# shellcheck source=common/scratch.sh
. "${BASH_SOURCE[0]%/*}/common/scratch.sh"
# shellcheck source=common/container.sh
. "${BASH_SOURCE[0]%/*}/common/container.sh"
# shellcheck source=common/results.sh
. "${BASH_SOURCE[0]%/*}/common/results.sh"

# A site's word for it may hold variables; where they are not set there is none.
if [[ ${TOOLKIT_DATA:-} == *\$* ]]; then
    TOOLKIT_DATA=$(expand "$TOOLKIT_DATA" "${SLURM_JOB_ID:-$$}" 2>/dev/null) || TOOLKIT_DATA=''
fi

[ -z "${TOOLKIT_PASS:-}" ] || TOOLKIT_PASS=${TOOLKIT_PASS//,/ }

# End the job if one of the variables above is not what it can be.
check_variables() {
    local name
    local -a passed
    check_bound "$TOOLKIT_HOME"
    for name in TOOLKIT_SCRATCH_GB TOOLKIT_CACHE_GB; do
        # With an exponent, too, which a site's large number may have.
        [[ ${!name:-0} =~ ^[0-9]*\.?[0-9]+(e\+?[0-9]+)?$ ]] ||
            fail "$name is ${!name}, it must be a number of GB"
    done
    [[ ${TOOLKIT_SYNC:-0} =~ ^(0|[1-9][0-9]*)$ ]] ||
        fail "TOOLKIT_SYNC is $TOOLKIT_SYNC, it must be a whole number of seconds"
    [[ ${TOOLKIT_STAGE_CHECK:-size} =~ ^(size|hash)$ ]] ||
        fail "TOOLKIT_STAGE_CHECK is $TOOLKIT_STAGE_CHECK, it must be size or hash"
    read -r -a passed <<<"${TOOLKIT_PASS:-}"
    for name in "${passed[@]}"; do
        [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || fail "TOOLKIT_PASS: $name is no variable's name" \
            "It holds names without values; set the variables themselves as well."
    done
}

# Prepare the job, if that is not done yet: from here on it ends in end_job, whatever happens.
# It sets WORK (its own folder in scratch), RESULTS, JOB_ID and JOB_NAME; what the program is to
# leave behind goes to WORK/results, which is /results in the container. With "direct" that is
# the folder RESULTS itself, which all nodes must then see.
begin_job() {
    [ -z "$STARTED" ] || return 0
    STARTED=$(date -Iseconds)
    name_job
    # A task of a job's step leaves what concerns the job as a whole to the job's script.
    [ -n "${TOOLKIT_TASK:-}" ] || find_results "${1:-}"
    if dry_run; then
        check_variables
        make_work
        RESULTS_HERE=$WORK/results
        return
    fi
    [ -n "${TOOLKIT_TASK:-}" ] || make_results
    trap end_job EXIT
    catch_signals
    check_variables
    load_modules
    make_work
    record running
    open_results "${1:-}"
}

# Run a program in the container and return its exit status. Signals reach it, and when
# it has ended nothing of it is left.
run_in_container() {
    local -a inputs=()
    begin_job
    find_apptainer
    find_image
    find_device
    IFS=, read -r -a inputs <<<"${INPUT:-}"
    if dry_run; then
        compose "$@"
        printf '%q ' "${COMMAND[@]}"
        printf '\n'
        return 0
    fi
    record running
    [ "${#inputs[@]}" = 0 ] || stage_in "${inputs[@]}"
    open_caches
    compose "$@"
    printf 'job %s on %s: %s, device %s, project %s\n' \
        "${SLURM_JOB_ID:-without Slurm}" "$(hostname)" "$IMAGE" "$DEVICE" "$TOOLKIT_HOME" >&2
    shield_mounts
    # In scratch, since Apptainer takes the working folder, which may be the home, with it.
    cd -- "$WORK" || return 2
    supervise "${COMMAND[@]}"
}

# End the job: bring home what it has made, remove what it leaves, and tell how it ended.
end_job() {
    local status=$? state
    trap - EXIT
    # Slurm asks each process of a job to end, and those that copy are needed still.
    trap '' HUP INT TERM USR1 USR2
    end_helpers
    [ -z "$CONTAINER" ] || kill -s KILL -- "-$CONTAINER" 2>/dev/null
    state=$(final_state "$status")
    cd /
    if close_results; then
        # Slurm gives a job that is to end little time.
        [ "$ASKED" != 0 ] || [ "${SLURM_PROCID:-0}" != 0 ] || close_caches
        remove_work
    else
        leave_node
        [ "$status" != 0 ] || status=1
        [ "$state" = cancelled ] || [ "$state" = timeout ] || state=failed
    fi
    [ -z "${TOOLKIT_TASK:-}" ] || exit "$status"
    if wants_requeue "$status" && [ "$state" = requeued ]; then
        scontrol requeue "$SLURM_JOB_ID" || state=$([ -n "$WARNED" ] && echo timeout || echo failed)
    fi
    record "$state" "$status" "$(date -Iseconds)"
    printf '%s: results in %s\n' "$state" "$RESULTS" >&2
    exit "$status"
}
