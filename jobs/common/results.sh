# shellcheck shell=bash
# shellcheck disable=SC2034  # the other files use what this one sets
# The folder of the job's results: what is in it comes from scratch, whichever way the job ends.

SYNCING=''  # the process that copies results back while the job runs

# Whether this is the batch script of Slurm's job: slurmd runs a copy of that name. If not, others
# like it may run in the same job, one after the other or at once.
is_batch() { [ "${0##*/}" = slurm_script ]; }

# Set JOB_ID, JOB_NAME, and RUN, which is also another for each run within a job of Slurm's.
name_job() {
    local folder now
    now=$(date +%Y%m%d-%H%M%S)-$$
    JOB_ID=${SLURM_JOB_ID:-$now}
    folder=$(dirname -- "$(readlink -f -- "$0")")
    JOB_NAME=${SLURM_JOB_NAME:-${folder##*/}} RUN=$JOB_ID
    if [ -n "${SLURM_JOB_ID:-}" ] && ! is_batch; then
        JOB_NAME=${folder##*/} RUN=$JOB_ID-$now
    fi
    JOB_NAME=${JOB_NAME//\//_}
}

# Set RESULTS to the folder for the results. With "direct" the container is to have it.
find_results() {
    RESULTS=${RESULTS:-${TOOLKIT_RESULTS:-results}/$JOB_NAME-$RUN}
    [[ $RESULTS == /* ]] || RESULTS=$PWD/$RESULTS
    [ "${1:-}" != direct ] || check_bound "$RESULTS" \
        "Name a folder for the results in RESULTS, or one for those of all jobs in TOOLKIT_RESULTS."
}

# Make the folder for the results.
make_results() {
    local other
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
    keep_own "$RESULTS"
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

# Give a job.json in a folder of results another name if it is no record but the program's own.
keep_own() {
    local file=$1/job.json
    [ -e "$file" ] || [ -L "$file" ] || return 0
    [ "$(grep -c '^  "\(job_id\|state\)": ' "$file" 2>/dev/null)" != 2 ] || return 0
    remove "$1/job.own.json"
    mv -T -- "$file" "$1/job.own.json" &&
        echo "warning: job.json is the record of the job: the program's own is job.own.json now" >&2
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

# Print type, size or mode, time and name of everything in a folder, each ended by a null
# character; a link's name is followed by // and where it leads. Times are whole seconds, since
# not every file system keeps more. What jobs have not yet brought home is left out, and their
# record.
listing() (
    set -o pipefail
    cd -- "$1" && find . -mindepth 1 -regextype posix-extended \
        -path ./job.json -prune -o -type d -regex '\./\.partial-[0-9-]+\.[A-Za-z0-9]{6}' -prune \
        -o -type d -printf 'd\t%m\t\t%P\0' -o -type l -printf 'l\t\t\t%P//%l\0' \
        -o -type f "${@:2}" -printf 'f\t%s\t%Ts\t%P\0' | LC_ALL=C sort -z
)

# Print the names in a listing that are of some types.
names() {
    LC_ALL=C grep -az "^[$1]"$'\t' |
        LC_ALL=C sed -z 's/^[^\t]*\t[^\t]*\t[^\t]*\t//; s,//.*,,'
}

sorted_names() { names "$1" | LC_ALL=C sort -z -u; }

minus() { LC_ALL=C comm -z -23 "$1" "$2"; }

both() { LC_ALL=C comm -z -12 "$1" "$2"; }

# Print the files and links of one listing whose names are not in another.
gone() { minus <(sorted_names fl <"$1") <(sorted_names dfl <"$2"); }

# Remove from a folder, by its own listing, the former and the new one, what the program has made
# a folder of since, or a file. What others have put there stays, and is then in the way.
make_way() {
    local to=$1 there=$2 list=$3 new=$4 name file
    both <(sorted_names fl <"$there") <(sorted_names d <"$new") |
        both - <(sorted_names fl <"$list") | (cd -- "$to" && xargs -0 -r rm -f --)
    while IFS= read -r -d '' name; do
        gone "$list" "$new" | while IFS= read -r -d '' file; do
            [[ $file != "$name"/* ]] || printf '%s\0' "$file"
        done | (cd -- "$to" && xargs -0 -r rm -f --)
        find "$to/$name" -depth -type d -empty -delete
    done < <(both <(sorted_names d <"$there") <(sorted_names fl <"$new"))
}

# Give folders the modes of a listing. Its owner can always write in what comes back.
give_modes() {
    local to=$1 list=$2 mode
    while IFS= read -r -d '' mode; do
        LC_ALL=C grep -az "^d"$'\t'"$mode"$'\t' "$list" | names d | (cd -- "$to" &&
            xargs -0 -r chmod -- "$(printf %o $((8#$mode | 8#700)))")
    done < <(LC_ALL=C grep -az "^d"$'\t' "$list" | cut -z -f 2 | LC_ALL=C sort -z -u)
}

# Copy what is new in a folder into another one, where each file appears whole. What the last
# such call found and is gone from the first since is removed from the second. The listing
# in a file says what that was. With "running", files that are being written are left out.
bring() {
    local from=$1 to=$2 list=$3 running=${4:-} partial name status=0 whole=1 since before
    # Where there is room: scratch may be full.
    partial=$(mktemp -d -- "$to/.partial-$JOB_ID.XXXXXX") && mkdir -- "$partial/files" || return 1
    # What cannot be read is not what is gone.
    listing "$from" >"$partial/new" || whole=0
    [ "$whole" = 1 ] || [ -n "$running" ] || status=1
    listing "$to" >"$partial/there" || status=1
    minus "$partial/new" "$partial/there" >"$partial/copy"
    if [ -e "$list" ]; then
        # What changed in the very second of the last listing looks the same.
        since=$(stat -c %Y -- "$list")
        listing "$from" -newermt "@$((since - 2))" |
            LC_ALL=C sort -z -u -o "$partial/copy" - "$partial/copy" || status=1
    fi
    [ -z "$running" ] || exact "$from" >"$partial/before"
    # First: two cp at once may be in each other's way when both make one.
    names fl <"$partial/copy" | LC_ALL=C sed -z -n 's,/[^/]*$,,p' | LC_ALL=C sort -z -u |
        (cd -- "$partial/files" && xargs -0 -r mkdir -p --) || status=1
    names fl <"$partial/copy" | (cd -- "$from" &&
        xargs -0 -r -P 4 -n 100 cp -dp --parents -t "$partial/files" --) || status=1
    if [ -n "$running" ]; then
        exact "$from" | minus "$partial/before" - | LC_ALL=C sed -z 's/^[^\t]*\t[^\t]*\t//' |
            (cd -- "$partial/files" && xargs -0 -r rm -f --)
    fi
    if [ "$status" = 0 ] && [ -e "$list" ]; then
        make_way "$to" "$partial/there" "$list" "$partial/new"
    fi
    # For nobody else until they have their modes.
    names d <"$partial/copy" | (umask 077 && cd -- "$to" && xargs -0 -r mkdir -p --) || status=1
    before=$list
    [ -e "$list" ] || before=$partial/there
    minus "$partial/new" "$before" >"$partial/changed"
    give_modes "$to" "$partial/changed"
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
        gone "$list" "$partial/new" | (cd -- "$to" && xargs -0 -r rm -f --)
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
    if (($(du -sB 1 -- "$RESULTS" | used) > $(room "$WORK"))) ||
        ! bring "$RESULTS" "$WORK/results" "$WORK/listing"; then
        printf 'warning: no room for what is in %s in %s: the job writes there directly\n' \
            "$RESULTS" "$SCRATCH_ROOT" >&2
        remove "$WORK/results"
        check_bound "$RESULTS"
        RESULTS_HERE=$RESULTS
        return 0
    fi
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
    keep_own "$WORK/results"
    bring "$WORK/results" "$RESULTS" "$WORK/listing" && return 0
    printf 'error: not all results could be copied to %s\n  They are still in %s on %s.\n' \
        "$RESULTS" "$WORK/results" "$(hostname)" >&2
    return 1
}
