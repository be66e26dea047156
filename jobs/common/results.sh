# shellcheck shell=bash
# shellcheck disable=SC2034  # the other files use what this one sets
# The folder of the job's results: what is in it comes from scratch, whichever way the job ends.

SYNCING=''  # the process that copies results back while the job runs

# Set JOB_ID and JOB_NAME.
name_job() {
    local folder
    JOB_ID=${SLURM_JOB_ID:-$(date +%Y%m%d-%H%M%S)-$$}
    folder=$(cd -- "$(dirname -- "$0")" && pwd)
    JOB_NAME=${SLURM_JOB_NAME:-${folder##*/}}
    JOB_NAME=${JOB_NAME//\//_}
}

# Make the folder for the results, and set RESULTS to it.
make_results() {
    local root=${TOOLKIT_RESULTS:-results} other
    RESULTS=${RESULTS:-$root/$JOB_NAME-$JOB_ID}
    [[ $RESULTS == /* ]] || RESULTS=$PWD/$RESULTS
    other=$(sed -n 's/^  "job_id": "\(.*\)",$/\1/p' "$RESULTS/job.json" 2>/dev/null)
    if [ -n "$other" ] && [ "$other" != "$JOB_ID" ] &&
        [ -n "$(timeout 30 squeue --noheader --states=running --jobs="$other" 2>/dev/null)" ]; then
        fail "job $other is still writing to $RESULTS" "Name another folder in RESULTS."
    fi
    { mkdir -p -- "$RESULTS" && [ -w "$RESULTS" ]; } ||
        fail "cannot write in the folder $RESULTS on $(hostname)" \
            "Name one for the results of jobs in TOOLKIT_RESULTS."
}

# Print a text as a JSON string; an empty one as null.
json() {
    local text=$1
    [ -n "$text" ] || { printf null && return 0; }
    text=${text//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    text=${text//$'\t'/\\t}
    printf '"%s"' "$(tr -d '\000-\037' <<<"$text")"
}

# Write job.json: what the job is, its state, its exit code and the time of its end.
record() {
    local log partial=$RESULTS/.job.json.$$
    [ -z "${TOOLKIT_TASK:-}" ] || return 0
    # Only a file, and not one of those that are no logs.
    log=$(readlink -f /proc/$$/fd/1)
    [ -f "$log" ] || log=''
    cat >"$partial" <<EOF_
{
  "job_id": $(json "$JOB_ID"),
  "name": $(json "$JOB_NAME"),
  "host": $(json "$(hostname)"),
  "start": $(json "$STARTED"),
  "image": $(json "${IMAGE:-}"),
  "results": $(json "$RESULTS"),
  "scratch": $(json "${WORK:-}"),
  "log": $(json "$log"),
  "state": $(json "$1"),
  "exit_code": ${2:-null},
  "end": $(json "${3:-}")
}
EOF_
    mv -f -- "$partial" "$RESULTS/job.json"
}

# Print how the job ended, by its exit status and what Slurm says of it.
final_state() {
    local told restarts
    if [ "$ASKED" != 0 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        told=$(timeout 5 scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null)
        restarts=$(sed -n 's/.* Restarts=\([0-9]*\).*/\1/p' <<<"$told")
        if [ "${restarts:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ]; then
            echo requeued
        elif [[ $told == *' JobState=TIMEOUT '* || $told == *' Reason=TimeLimit '* ]]; then
            echo timeout
        else
            echo cancelled
        fi
    elif [ "$ASKED" != 0 ]; then
        echo cancelled
    elif [ "$1" = 0 ]; then
        echo completed
    elif wants_requeue "$1"; then
        echo requeued
    elif [ "$1" = 85 ] && [ -n "$WARNED" ]; then
        echo timeout
    else
        echo failed
    fi
}

# Whether the program has saved its state and wants to go on in a new run of the job.
wants_requeue() {
    [ "$1" = 85 ] && [ "${REQUEUE:-}" = 1 ] && [ -n "${SLURM_JOB_ID:-}" ]
}

# Print type, size, time and name of everything in a folder, each ended by a null character.
# Times are whole seconds, since not every file system keeps more.
listing() (
    set -o pipefail
    cd -- "$1" && find . -mindepth 1 -name '.partial-*' -prune \
        -o -type d -printf 'd\t\t\t%P\0' -o -type l -printf 'l\t%l\t\t%P\0' \
        -o -type f "${@:2}" -printf 'f\t%s\t%Ts\t%P\0' | LC_ALL=C sort -z
)

# Print the names in a listing that are of some types.
names() { LC_ALL=C grep -az "^[$1]"$'\t' | LC_ALL=C sed -z 's/^[^\t]*\t[^\t]*\t[^\t]*\t//'; }

minus() { LC_ALL=C comm -z -23 "$1" "$2"; }

# Copy what is new in a folder into another one, where each file appears whole. What the last
# such call found and is gone from the first since is removed from the second. The listing
# in a file says what that was. With "running", files that are being written are left out.
bring() {
    local from=$1 to=$2 list=$3 running=${4:-} partial name status=0 whole=1 since
    # Where there is room: scratch may be full.
    partial=$(mktemp -d -- "$to/.partial-$JOB_ID.XXXXXX") && mkdir -- "$partial/files" || return 1
    # What cannot be read is not what is gone.
    listing "$from" >"$partial/new" || whole=0
    [ "$whole" = 1 ] || [ -n "$running" ] || status=1
    listing "$to" | minus "$partial/new" - >"$partial/copy" || status=1
    if [ -e "$list" ]; then
        # What changed in the very second of the last listing looks the same.
        since=$(stat -c %Y -- "$list")
        listing "$from" -newermt "@$((since - 2))" |
            LC_ALL=C sort -z -u -o "$partial/copy" - "$partial/copy" || status=1
    fi
    names d <"$partial/copy" | (cd -- "$to" && xargs -0 -r mkdir -p --) || status=1
    [ -z "$running" ] || exact "$from" >"$partial/before"
    names fl <"$partial/copy" | (cd -- "$from" &&
        xargs -0 -r -P 4 -n 100 cp -dp --parents -t "$partial/files" --) || status=1
    if [ -n "$running" ]; then
        exact "$from" | minus "$partial/before" - | LC_ALL=C sed -z 's/^[^\t]*\t[^\t]*\t//' |
            (cd -- "$partial/files" && xargs -0 -r rm -f --)
    fi
    # Should this be killed now, what is brought is known all the same.
    if [ -e "$list" ]; then
        LC_ALL=C sort -z -u -- "$list" "$partial/new" >"$list.new" &&
            touch -r "$partial/new" -- "$list.new" && mv -f -- "$list.new" "$list"
    fi 2>/dev/null
    while IFS= read -r -d '' name; do
        (cd -- "$partial/files/$name" && find . -maxdepth 1 ! -type d -print0 |
            xargs -0 -r mv -f -t "$to/$name" --) || status=1
    done < <(cd -- "$partial/files" && find . -type d -print0)
    if [ "$status$whole" = 01 ] && [ -e "$list" ]; then
        minus <(names fl <"$list" | LC_ALL=C sort -z -u) \
            <(names fl <"$partial/new" | LC_ALL=C sort -z -u) |
            (cd -- "$to" && xargs -0 -r rm -f --)
    fi
    if [ "$status$whole" = 01 ]; then
        mv -f -- "$partial/new" "$list.new" 2>/dev/null && mv -f -- "$list.new" "$list"
    fi
    rm -rf -- "$partial"
    return "$status"
}

# Print size, time and name of every file of a folder, as exactly as its file system knows.
exact() { (cd -- "$1" && find . -type f -printf '%s\t%T@\t%P\0') | LC_ALL=C sort -z; }

# Have what is in RESULTS at hand in scratch, and copy what is new back now and then: a node
# that breaks takes its scratch with it. RESULTS_HERE is where the program writes.
open_results() {
    RESULTS_HERE=$RESULTS
    [ "${1:-}" != direct ] || return 0
    RESULTS_HERE=$WORK/results
    mkdir -- "$WORK/results"
    if ! bring "$RESULTS" "$WORK/results" "$WORK/listing"; then
        printf 'warning: no room for what is in %s in %s: the job writes there directly\n' \
            "$RESULTS" "$SCRATCH_ROOT" >&2
        remove "$WORK/results"
        RESULTS_HERE=$RESULTS
        return 0
    fi
    rm -f -- "$WORK/results/job.json"
    listing "$WORK/results" >"$WORK/listing"
    sync_every "${TOOLKIT_SYNC:-600}"
}

# Copy the results back every so many seconds.
sync_every() {
    end_group "$SYNCING"
    SYNCING=''
    [ "$1" != 0 ] || return 0
    set -m
    (
        trap '' TERM
        while sleep "$1"; do
            bring "$WORK/results" "$RESULTS" "$WORK/listing" running
        done
    ) >/dev/null 2>&1 &
    SYNCING=$!
    set +m
}

# Copy the results back for good. Where that fails they stay where they are.
close_results() {
    end_group "$SYNCING"
    [ -n "$WORK" ] && [ -e "$WORK/listing" ] || return 0
    rm -rf -- "$RESULTS/.partial-$JOB_ID."*
    bring "$WORK/results" "$RESULTS" "$WORK/listing" && return 0
    printf 'error: not all results could be copied to %s\n  They are still in %s on %s.\n' \
        "$RESULTS" "$WORK/results" "$(hostname)" >&2
    return 1
}
