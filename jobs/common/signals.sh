# shellcheck shell=bash
# shellcheck disable=SC2034  # the other files use what this one sets
# Running a program so that signals reach it and nothing of it is left.

HELPERS=()    # processes that run beside the program
CONTAINER=''  # the process that runs now, or "pending"
CAUGHT=''     # the last signal
ASKED=0       # how often the job was asked to end
WARNED=''     # whether the warning before the time limit came

# Take the signals from now on; before a program runs they end the job.
catch_signals() {
    local number
    for number in HUP INT TERM USR1 USR2; do
        # shellcheck disable=SC2064  # the name is known now
        trap "forward $number" "$number"
    done
}

# Hand a signal on to the program.
forward() {
    CAUGHT=$1
    [ "$CONTAINER" != pending ] || return 0
    if [ "$1" = USR1 ] || [ "$1" = USR2 ]; then
        WARNED=1
        [ -z "$CONTAINER" ] || warn "$1"
        # What it saves now is not to be lost.
        [ -z "$SYNCING" ] || sync_every 20
        return 0
    fi
    ASKED=$((ASKED + 1))
    # Nothing runs that could take it: what is being copied is not worth to wait for.
    [ -n "$CONTAINER" ] || exit $((128 + $(kill -l "$1")))
    if [ "$ASKED" = 1 ]; then
        kill -s "$1" -- "$CONTAINER" 2>/dev/null
        limit_patience
    else
        # A second request to end is not to be refused.
        kill_program
    fi
}

# Kill the program.
kill_program() {
    local _
    # Only what Apptainer runs: by itself it then unmounts the image. Where it has become
    # the program, or does not come to its end, the whole.
    # shellcheck disable=SC2046  # several numbers
    kill -s KILL $(children_of "$CONTAINER") 2>/dev/null
    for _ in {1..50}; do
        kill -s 0 -- "$CONTAINER" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -s KILL -- "-$CONTAINER" 2>/dev/null
}

# Kill the program a little before Slurm kills everything, so that what it wrote can be copied
# back and scratch be removed; much of it is copied while the program still ends.
limit_patience() {
    local asked=$SECONDS seconds
    [ -n "${SLURM_JOB_ID:-}" ] || return 0
    end_group "$SYNCING"
    SYNCING=''
    set -m
    (
        trap '' TERM
        seconds=$(timeout 2 scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
        seconds=${seconds:-30}
        sleep $((seconds / 2))
        [ ! -e "$WORK/listing" ] || bring "$WORK/results" "$RESULTS" "$WORK/listing" running
        seconds=$((asked + seconds - (seconds < 12 ? 2 : seconds / 6) - SECONDS))
        ((seconds <= 0)) || sleep "$seconds"
        kill_program
    ) >/dev/null 2>&1 &
    HELPERS+=($!)
    set +m
}

children_of() { cat /proc/"$1"/task/*/children 2>/dev/null; }

# Tell the program that the time limit is near. What does not handle the signal would be ended
# by it, and so would the launcher of a program that does: it goes to those that handle it.
warn() {
    tell "$1" "$CONTAINER" && return 0
    echo "note: the program does not handle SIG$1 (yet): it goes on" >&2
    set -m
    (
        trap '' TERM
        while sleep 1; do
            tell "$1" "$CONTAINER" && break
        done
    ) >/dev/null 2>&1 &
    HELPERS+=($!)
    set +m
}

# Send a signal to each topmost process below some, themselves included, that handles it.
# What those started inherits their handlers (a loader's workers), and is theirs to tell.
tell() {
    local signal=$1 pid name mask told=1
    for pid in "${@:2}"; do
        read -r name 2>/dev/null <"/proc/$pid/comm" || continue
        # Caught, or blocked to be waited for.
        mask=$(sed -n 's/^Sig\(Cgt\|Blk\):[[:space:]]*/16#/p' "/proc/$pid/status" 2>/dev/null)
        # Apptainer takes every signal and would give it to a program that does not.
        if [[ $name != starter* && $name != apptainer && $name != singularity ]] &&
            (((${mask//$'\n'/ | }) >> ($(kill -l "$signal") - 1) & 1)); then
            kill -s "$signal" -- "$pid" 2>/dev/null && told=0
        else
            # shellcheck disable=SC2046  # several numbers
            tell "$signal" $(children_of "$pid") && told=0
        fi
    done
    return "$told"
}

# End what helps the program while it runs.
end_helpers() {
    local helper
    for helper in "${HELPERS[@]}"; do
        end_group "$helper"
    done
    HELPERS=()
}

# Kill a process group and wait until it is gone.
end_group() {
    local _
    [ -n "$1" ] || return 0
    kill -s KILL -- "-$1" 2>/dev/null
    wait "$1" 2>/dev/null
    for _ in {1..50}; do
        kill -s 0 -- "-$1" 2>/dev/null || return 0
        sleep 0.1
    done
}

# Run a command and return its exit status. Signals reach it, and when it has ended nothing
# of it is left.
supervise() {
    local status=0 answer
    # In the background, since bash runs a trap only after the command in the foreground has
    # ended; as a process group, so that what the program leaves behind can be found.
    CAUGHT='' CONTAINER=pending
    set -m
    "$@" </dev/null &
    CONTAINER=$!
    set +m
    [ -z "$CAUGHT" ] || forward "$CAUGHT"  # it came before there was a process
    while :; do
        CAUGHT=''
        wait "$CONTAINER"
        answer=$?
        # 127: it had ended before, and its status was already told.
        [ "$answer" = 127 ] && [ "$ASKED" != 0 ] || status=$answer
        [ -n "$CAUGHT" ] || break
    done
    end_helpers
    kill -s KILL -- "-$CONTAINER" 2>/dev/null
    CONTAINER=''
    return "$status"
}
