# shellcheck shell=bash
# Node-local scratch: the job's own folder, its input, its warm caches.

# Nothing that the environment calls so: these folders are removed.
# MADE_SCRATCH is the topmost folder that was made for scratch, SCRATCH_ROOT or one above it.
SCRATCH_ROOT='' MADE_SCRATCH='' WORK='' NODE='' KEEP=''

# Print a word of the site's with its variables expanded; one that is not set is an error.
expand() { USER=${USER:-$(id -un)} SLURM_JOB_ID=$2 bash -uc "printf %s \"$1\""; }

# Set SCRATCH_ROOT to the node-local folder that the site names.
find_scratch() {
    local job=${SLURM_JOB_ID:-$$} word
    # shellcheck disable=SC2016  # expanded below
    word=${TOOLKIT_SCRATCH:-'${TMPDIR:-/tmp}'}
    dry_run && job=${SLURM_JOB_ID:-JOBID}
    { SCRATCH_ROOT=$(expand "$word" "$job") && [ -n "$SCRATCH_ROOT" ]; } ||
        fail "the scratch folder $word cannot be expanded on $(hostname)" \
            "Set TOOLKIT_SCRATCH to a folder in which this user can write."
    SCRATCH_ROOT=$(realpath -ms -- "$SCRATCH_ROOT")
    [[ $SCRATCH_ROOT != *[:,]* ]] ||
        fail "the scratch folder $SCRATCH_ROOT: Apptainer binds no names with : or ," \
            "Name another in TOOLKIT_SCRATCH."
}

# Set WORK to a new folder in scratch, which is removed with the job.
make_work() {
    local job=${SLURM_JOB_ID:-$$} top
    find_scratch
    if dry_run; then
        WORK=$SCRATCH_ROOT/toolkit-${SLURM_JOB_ID:-JOBID}.XXXXXX
        return 0
    fi
    if [ ! -d "$SCRATCH_ROOT" ]; then
        top=$SCRATCH_ROOT
        while [ ! -e "${top%/*}/" ]; do top=${top%/*}; done
        mkdir -p -- "$SCRATCH_ROOT" ||
            fail "cannot make the scratch folder $SCRATCH_ROOT on $(hostname)"
        MADE_SCRATCH=$top
    fi
    WORK=$(mktemp -d -- "$SCRATCH_ROOT/toolkit-$job.XXXXXX") ||
        fail "cannot write in the scratch folder $SCRATCH_ROOT on $(hostname)"
    # Readable for nobody else, as mktemp makes it: scratch may be everybody's.
    mkdir -- "$WORK/home" "$WORK/tmp" "$WORK/apptainer" "$WORK/bin" ||
        fail "no room in the scratch folder $SCRATCH_ROOT on $(hostname)"
}

remove_work() {
    local folder=$SCRATCH_ROOT
    [ -z "$WORK" ] || dry_run || remove "$WORK"
    leave_node
    [ -n "$MADE_SCRATCH" ] || return 0
    # Not if something else was put there meanwhile.
    while rmdir -- "$folder" 2>/dev/null && [ "$folder" != "$MADE_SCRATCH" ]; do
        folder=${folder%/*}
    done
}

# Remove a folder, also one with folders that the program has made read-only.
remove() {
    rm -rf -- "$1" 2>/dev/null && return 0
    find "$1" -type d ! -perm -u=rwx -exec chmod u+rwx -- {} + 2>/dev/null
    rm -rf -- "$1"
}

# What the tasks of a job on one node share

# Set NODE to the folder that this job's tasks on this node share, and hold it. The last of
# them removes it.
enter_node() {
    local name=toolkit-${SLURM_JOB_ID:-$$}-${SLURMD_NODENAME:-$(hostname -s)} _
    [ -z "$NODE" ] || return 0
    for _ in {1..100}; do
        mkdir -m 700 -- "$SCRATCH_ROOT/$name" 2>/dev/null
        # Its name can be guessed, and scratch may be everybody's. Not there: another task may just
        # have removed it.
        if [ -L "$SCRATCH_ROOT/$name" ] ||
            { [ ! -O "$SCRATCH_ROOT/$name" ] && [ -e "$SCRATCH_ROOT/$name" ]; }; then
            fail "$SCRATCH_ROOT/$name on $(hostname) is not this user's"
        fi
        { exec {NODE_HOLD}>>"$SCRATCH_ROOT/$name/hold"; } 2>/dev/null || continue
        flock -s "$NODE_HOLD"
        # Another task may just have removed it.
        if [ "$SCRATCH_ROOT/$name/hold" -ef "/proc/self/fd/$NODE_HOLD" ]; then
            NODE=$SCRATCH_ROOT/$name
            mkdir -p -- "$NODE/input" && return 0
        fi
        exec {NODE_HOLD}>&-
    done
    NODE=''
    fail "no room in the scratch folder $SCRATCH_ROOT on $(hostname)"
}

leave_node() {
    [ -n "$NODE" ] || return 0
    if flock -n -x "$NODE_HOLD"; then
        remove "$NODE"
    fi
    exec {NODE_HOLD}>&-
    NODE=''
}

# Print how many bytes may still be put in a folder of scratch.
room() {
    local free memory
    free=$(df --output=avail -B 1 -- "$1" | tail -n 1)
    if [ "$(stat -f -c %T -- "$1")" = tmpfs ]; then
        # Files there are memory of the job: no more than half of it.
        memory=$((${SLURM_MEM_PER_NODE:-0} << 20))
        [ "$memory" != 0 ] ||
            memory=$(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo)000
        ((memory / 2 >= free)) || free=$((memory / 2))
    fi
    if [ -n "${TOOLKIT_SCRATCH_GB:-}" ]; then
        memory=$(($(gigabytes "$TOOLKIT_SCRATCH_GB") - $(du -sB 1 -- ${NODE:+"$NODE"} "$WORK" | used)))
        ((memory >= free)) || free=$memory
    fi
    echo $((free))
}

gigabytes() { awk -v number="$1" 'BEGIN { printf "%.0f", number * 1e9 }'; }

used() { awk '{ sum += $1 } END { printf "%d", sum }'; }

# Copy files and folders to the node's scratch, once for all of the job's tasks on it; in
# the container each is /input/NAME, read-only. What has no room there is used where it is.
stage_in() {
    local source name need lock
    enter_node
    for source in "$@"; do
        [ -n "$source" ] || continue
        source=$(realpath -ms -- "$source")
        name=${source##*/}
        [ -n "$name" ] || fail "the input cannot be all of $source" "Name the folder that is wanted."
        [ -r "$source" ] || fail "cannot read the input $source on $(hostname)"
        check_bound "$source"
        exec {lock}>>"$NODE/lock"
        flock -x "$lock"  # another task may be copying just now
        if [ -e "$NODE/input/$name" ]; then
            [ "$(<"$NODE/$name.source")" = "$source" ] ||
                fail "two inputs are called $name: $source and $(<"$NODE/$name.source")"
        else
            # Each file takes whole blocks.
            need=$(find -L "$source" -type f -printf '%s\n' |
                awk '{ sum += int(($1 + 4095) / 4096) * 4096 } END { printf "%d", sum }')
            if ((need + (need >> 5) > $(room "$NODE"))); then
                printf 'warning: no room for the %s bytes of %s in %s: it is read where it is\n' \
                    "$need" "$source" "$SCRATCH_ROOT" >&2
            elif ! copy_checked "$source" "$NODE/part"; then
                remove "$NODE/part"
                printf 'warning: %s cannot be copied to %s: it is read where it is\n' \
                    "$source" "$SCRATCH_ROOT" >&2
            else
                printf %s "$source" >"$NODE/$name.source"
                mv -T -- "$NODE/part" "$NODE/input/$name"
            fi
        fi
        exec {lock}>&-
        if [ -e "$NODE/input/$name" ]; then
            STAGED=$NODE/input/$name
        else
            STAGED=$source
        fi
        BINDS+=("$STAGED:/input/$name:ro")
    done
}

# Copy a file or a folder by several processes, and compare the copy with it: the sizes, or
# with TOOLKIT_STAGE_CHECK=hash the contents. Links are followed: they may lead out of it.
copy_checked() {
    local from=$1 to=$2 blocks
    if [ -d "$from" ]; then
        mkdir -- "$to" &&
            (cd -- "$from" && find -L . -type d -print0) |
            (cd -- "$to" && xargs -0 -r mkdir -p --) &&
            (cd -- "$from" && find -L . -type f -print0 |
                xargs -0 -r -P 8 -n 64 cp -Lp --parents -t "$to" --) || return 1
    else
        # One stream is slower than a parallel file system: pieces of 64 MiB.
        blocks=$(($(stat -L -c %s -- "$from") / (4 << 20)))
        seq 0 16 "$blocks" | xargs -P 8 -I {} dd if="$from" of="$to" bs=4M count=16 skip={} \
            seek={} conv=notrunc iflag=fullblock status=none && touch -r "$from" -- "$to" || return 1
    fi
    cmp -s <(contents "$from") <(contents "$to")
}

# Print what copies are compared by.
contents() {
    local folder=$1 name=.
    [ -d "$1" ] || { folder=$(dirname -- "$1") && name=./$(basename -- "$1"); }
    cd -- "$folder" || return 1
    if [ "${TOOLKIT_STAGE_CHECK:-size}" = hash ]; then
        # By lines, so that those of several processes do not mix.
        find -L "$name" -type f -print0 | xargs -0 -r -P 4 -n 64 stdbuf -oL sha256sum -b --
    else
        find -L "$name" -type f -printf '%s %p\n'
    fi | if [ -d "$1" ]; then
        LC_ALL=C sort
    else
        sed 's/ .*//'  # its name may be another
    fi
}

# Caches of compiled kernels and the like

# Set KEEP to the file in which a user's caches are kept between jobs, if there is a place.
find_keep() {
    local folder=${TOOLKIT_CACHE:-}
    [ "$folder" != none ] || { KEEP='' && return 0; }
    if [ -z "$folder" ]; then
        folder=${TOOLKIT_DATA:-${DATA:-}}
        folder=${folder:+$folder/.toolkit-cache-$(id -un)}
        folder=${folder:-${RESULTS%/*}/.cache}
    fi
    [[ $folder == /* ]] || folder=$PWD/$folder
    KEEP=$folder/$(basename -- "$IMAGE" .sif)-$DEVICE.tar
}

# Make the job's own cache folders, with what the user's last job left.
open_caches() {
    local name
    find_keep
    mkdir -- "$WORK/cache"
    if [ -s "$KEEP" ] && ! tar -xf "$KEEP" -C "$WORK/cache" 2>/dev/null; then
        echo "warning: the caches in $KEEP are broken: the job starts without" >&2
        remove "$WORK/cache"
        mkdir -- "$WORK/cache"
    fi
    for name in "${CACHES[@]}"; do
        mkdir -p -- "$WORK/cache/${name#*=}"
    done
    exact "$WORK/cache" >"$WORK/cache.before"
    KEPT=$(stat -c %i:%Y -- "$KEEP" 2>/dev/null)
}

# Keep the caches for the user's next job, with what other jobs have kept meanwhile.
close_caches() {
    local lock partial size limit
    [ -n "$KEEP" ] && [ -e "$WORK/cache.before" ] || return 0
    exact "$WORK/cache" | cmp -s - "$WORK/cache.before" && return 0
    limit=$(gigabytes "${TOOLKIT_CACHE_GB:-2}")
    size=$(du -sB 1 -- "$WORK/cache" | used)
    if ((size > limit)); then
        # Downloads of all kinds; what was compiled is dearer.
        remove "$WORK/cache/xdg"
        size=$(du -sB 1 -- "$WORK/cache" | used)
    fi
    if ((size > limit)); then
        echo "note: caches of $size bytes are not kept; TOOLKIT_CACHE_GB sets the limit" >&2
        return 0
    fi
    mkdir -p -- "${KEEP%/*}" 2>/dev/null && [ -w "${KEEP%/*}" ] || return 0
    exec {lock}>>"$KEEP.lock"
    flock -w 30 "$lock" || { exec {lock}>&- && return 0; }
    if [ "$(stat -c %i:%Y -- "$KEEP" 2>/dev/null)" != "$KEPT" ]; then
        tar -xf "$KEEP" -C "$WORK/cache" --skip-old-files 2>/dev/null
    fi
    if partial=$(mktemp -- "$KEEP.XXXXXX"); then
        tar -cf "$partial" -C "$WORK/cache" . && mv -f -- "$partial" "$KEEP"
        rm -f -- "$partial"
    fi
    exec {lock}>&-
}
