# shellcheck shell=bash
# Every job reads these variables; none must be set:
#
#   IMAGE, TOOLKIT_IMAGE   SIF to use; by default monai.sif in the project's build/
#   TOOLKIT_HOME           the project; found from where the job was submitted
#   TOOLKIT_APPTAINER      program that runs containers; else apptainer or singularity
#                          on the PATH, else the project's own in .tools/
#   TOOLKIT_DEVICE         rocm, cuda, hpu or cpu; by default what the node's device
#                          files say
#   TOOLKIT_SCRATCH        node-local folder for what the job writes, removed after it;
#                          by default ${TMPDIR:-/tmp}; shell variables in it are expanded
#   TOOLKIT_BINDS          folders for the container, SOURCE[:DESTINATION[:ro]], by commas
#   TOOLKIT_MODULES        environment modules to load first, such as apptainer
#   TOOLKIT_PASS           names of further variables that the container shall see; it sees
#                          SLURM_*, OMP_NUM_THREADS and those that choose devices anyway
#   TOOLKIT_DRY_RUN        if 1, print the container's command line and do nothing
#
# The container sees neither the user's home nor the environment of the submitting shell.

# What the job scripts share. A job script finds the project, sources this file and calls
# run_in_container; `toolkit submit` sets the variables above from the site's file.

# Where the project's jobs/ is inside the container.
# shellcheck disable=SC2034  # for the job scripts
JOBS=/toolkit/jobs

# Say what failed and what to do about it, and end the job: the call was wrong.
fail() {
    printf 'error: %s\n' "$1" >&2
    [ -z "${2:-}" ] || printf '  %s\n' "$2" >&2
    exit 2
}

dry_run() { [ "${TOOLKIT_DRY_RUN:-}" = 1 ]; }

# End the job if it was given arguments, which would otherwise be ignored in silence.
no_arguments() {
    [ $# -eq 0 ] || fail "this job takes no arguments: $*" "Options of sbatch go before the script."
}

load_modules() {
    local file
    [ -n "${TOOLKIT_MODULES:-}" ] && ! dry_run || return 0
    # A batch shell is no login shell: `module` may not be there yet.
    for file in /etc/profile.d/{modules,lmod,z00_lmod}.sh; do
        type module >/dev/null 2>&1 && break
        # shellcheck disable=SC1090
        [ -r "$file" ] && . "$file"
    done
    type module >/dev/null 2>&1 ||
        fail "no environment modules on $(hostname), but TOOLKIT_MODULES is $TOOLKIT_MODULES"
    # shellcheck disable=SC2086  # several names
    module load $TOOLKIT_MODULES || fail "cannot load the modules $TOOLKIT_MODULES"
}

# Set APPTAINER to the program.
find_apptainer() {
    local name
    if [ -n "${TOOLKIT_APPTAINER:-}" ]; then
        APPTAINER=$(command -v -- "$TOOLKIT_APPTAINER") ||
            fail "TOOLKIT_APPTAINER: $TOOLKIT_APPTAINER is not a program that can be run"
        return
    fi
    for name in apptainer singularity "$TOOLKIT_HOME/.tools/bin/apptainer"; do
        APPTAINER=$(command -v -- "$name") && return
    done
    # A login node may have none where the compute nodes do.
    APPTAINER=apptainer
    dry_run || fail "no apptainer or singularity on $(hostname)" \
        "Run \`make apptainer\` in $TOOLKIT_HOME, or name a program in TOOLKIT_APPTAINER."
}

# Set IMAGE to the image's full path.
find_image() {
    local build=${TOOLKIT_BUILD_DIR:-build} given=${IMAGE:-${TOOLKIT_IMAGE:-}}
    [[ $build == /* ]] || build=$TOOLKIT_HOME/$build
    IMAGE=${given:-$build/monai.sif}
    [[ $IMAGE == /* ]] || IMAGE=$PWD/$IMAGE
    [ -e "$IMAGE" ] || fail "no image $IMAGE" \
        "Make it with \`make build-monai-sif\` in $TOOLKIT_HOME, or name another in IMAGE."
}

# Print rocm, cuda, hpu or cpu by the device files below a root folder.
detect_device() {
    local root=${1:-}
    if [ -e "$root/dev/kfd" ]; then
        echo rocm
    elif [ -e "$root/dev/nvidiactl" ]; then
        echo cuda
    # Other accelerators share /dev/accel: only vendor 1da3 is Gaudi.
    elif [ -e "$root/dev/hl0" ] || grep -qs 0x1da3 "$root"/sys/class/accel/accel*/device/vendor; then
        echo hpu
    else
        echo cpu
    fi
}

# Set DEVICE.
find_device() {
    local found
    found=$(detect_device)
    DEVICE=${TOOLKIT_DEVICE:-$found}
    case $DEVICE in
        rocm | cuda | hpu | cpu) ;;
        *) fail "TOOLKIT_DEVICE is $DEVICE, it must be rocm, cuda, hpu or cpu" ;;
    esac
    if [ "$DEVICE" != cpu ] && [ "$DEVICE" != "$found" ] && ! dry_run; then
        printf 'warning: %s has no device files for %s: the program will find no device\n' \
            "$(hostname)" "$DEVICE" >&2
    fi
}

# Whether root lacks capabilities, as in many VMs and containers; Apptainer would ask for all.
restricted_root() {
    local held every
    [ "$(id -u)" = 0 ] || return 1
    held=$(sed -n 's/^CapEff:[[:space:]]*//p' /proc/self/status)
    every=$(((1 << ($(</proc/sys/kernel/cap_last_cap) + 1)) - 1))
    (((16#$held & every) != every))
}

# Whether this user can mount an image: by a setuid Apptainer, or by squashfuse. Where
# squashfuse is there and /dev/fuse is not for this user, Apptainer stops unless told to unpack.
can_mount() {
    local program starter
    program=$(readlink -f -- "$(command -v -- "$APPTAINER")")
    for starter in "${program%/*/*}"/lib*/{,*/}{apptainer,singularity}/bin/starter-suid; do
        [ -u "$starter" ] && return
    done
    [ -r /dev/fuse ] && [ -w /dev/fuse ]
}

# Set WORK to a new folder in scratch, which is removed with the job.
make_work() {
    local job=${SLURM_JOB_ID:-$$} scratch word
    # shellcheck disable=SC2016  # expanded below
    word=${TOOLKIT_SCRATCH:-'${TMPDIR:-/tmp}'}
    dry_run && job=${SLURM_JOB_ID:-JOBID}
    # In a shell of its own: a variable that is not set ends it.
    scratch=$(
        # shellcheck disable=SC2030
        USER=${USER:-$(id -un)} SLURM_JOB_ID=$job
        eval "printf %s \"$word\""
    ) || fail "the scratch folder $word cannot be expanded on $(hostname)" \
        "Set TOOLKIT_SCRATCH to a folder in which this user can write."
    if dry_run; then
        WORK=$scratch/toolkit-$job.XXXXXX
        return
    fi
    if [ ! -d "$scratch" ]; then
        mkdir -p -- "$scratch" || fail "cannot make the scratch folder $scratch on $(hostname)"
        made_scratch=$scratch
    fi
    WORK=$(mktemp -d -- "$scratch/toolkit-$job.XXXXXX") ||
        fail "cannot write in the scratch folder $scratch on $(hostname)"
    mkdir -- "$WORK/home" "$WORK/tmp" "$WORK/apptainer" "$WORK/bin"
}

# Make stand-ins for the programs that mount the image, found first on Apptainer's PATH.
# To end a job Slurm sends TERM to all of its processes, and the image would be gone while the
# program still saves its work. They end by themselves when Apptainer unmounts the image.
shield_mounts() {
    local program name found
    program=$(readlink -f -- "$APPTAINER")
    for name in squashfuse_ll squashfuse fuse-overlayfs; do
        found=$(PATH="${program%/*}:$PATH" command -v "$name") || continue
        printf '#!/bin/bash\ntrap "" HUP INT TERM\nexec %q "$@"\n' "$found" >"$WORK/bin/$name"
        chmod +x "$WORK/bin/$name"
    done
}

remove_work() {
    [ -z "${WORK:-}" ] || dry_run || rm -rf -- "$WORK"
    # Not if something else was put there meanwhile.
    [ -z "${made_scratch:-}" ] || rmdir -- "$made_scratch" 2>/dev/null
}

# Print the names of the variables that the container shall see.
passed_names() {
    local masks
    compgen -A export SLURM | grep -vx SLURM_CONF  # that file is not there
    printf '%s\n' OMP_NUM_THREADS
    # shellcheck disable=SC2086  # several names
    [ -z "${TOOLKIT_PASS:-}" ] || printf '%s\n' $TOOLKIT_PASS
    case $DEVICE in
        # Slurm sets several of these to the same numbers. Within what the first shows, the
        # second counts from 0 again, and no GPU is left: one of them only.
        rocm) masks=(ROCR_VISIBLE_DEVICES HIP_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES) ;;
        hpu) masks=(HABANA_VISIBLE_MODULES) ;;
        *) masks=(CUDA_VISIBLE_DEVICES) ;;
    esac
    for mask in "${masks[@]}"; do
        if [ -n "${!mask+set}" ]; then
            printf '%s\n' "$mask"
            break
        fi
    done
}

# Set COMMAND to what runs a program in the container.
compose() {
    local prefix=APPTAINERENV name file bind
    local -a binds=()
    # A real SingularityCE knows its own prefix only; "apptainer" may also be called singularity.
    if [[ $("$APPTAINER" --version 2>/dev/null) == singularity* ]]; then
        prefix=SINGULARITYENV
    fi
    # Through the environment and not by --env, which splits values at commas.
    COMMAND=(env)
    while read -r name; do
        if [ -n "${!name+set}" ]; then
            COMMAND+=("${prefix}_$name=${!name}")
        fi
    done < <(passed_names | sort -u)
    # Else it makes ~/.apptainer, and where the node has no FUSE it unpacks the image to /tmp.
    for name in CONFIGDIR CACHEDIR TMPDIR; do
        COMMAND+=("${prefix%ENV}_$name=$WORK/apptainer")
    done
    COMMAND+=("PATH=$WORK/bin:$PATH")  # see shield_mounts

    if ! can_mount; then
        COMMAND+=("${prefix%ENV}_UNSQUASH=1")
        dry_run || printf 'warning: %s may not open /dev/fuse on %s: the image is unpacked to %s\n' \
            "$(id -un)" "$(hostname)" "$WORK" >&2
    fi

    COMMAND+=("$APPTAINER" --quiet exec --cleanenv)
    restricted_root && COMMAND+=(--userns)
    COMMAND+=(--home "$WORK/home:/home/job" --pwd /home/job --bind "$WORK/tmp:/tmp")
    case $DEVICE in
        rocm) COMMAND+=(--rocm) ;;
        cuda) COMMAND+=(--nv) ;;
        hpu)
            # Gaudi's library wants each file by itself; the folder as a whole is not enough.
            for file in /dev/accel/* /dev/hl[0-9]* /dev/hl_controlD*; do
                [ -e "$file" ] && COMMAND+=(--bind "$file")
            done
            ;;
    esac
    COMMAND+=(--bind "$TOOLKIT_HOME/jobs:$JOBS:ro")
    IFS=, read -r -a binds <<<"${TOOLKIT_BINDS:-}"
    for bind in "${binds[@]}"; do
        if [ -e "${bind%%:*}" ] || dry_run; then
            COMMAND+=(--bind "$bind")
        else
            printf 'warning: %s is not on %s and not bound\n' "${bind%%:*}" "$(hostname)" >&2
        fi
    done
    COMMAND+=("$IMAGE" "$@")
}

# Hand a signal on to the container. A second request to end is not to be refused.
forward() {
    local _
    caught=$1
    [ -n "$container" ] || return
    if [ "$1" != USR1 ] && [ "$1" != USR2 ]; then
        asked=$((asked + 1))
    fi
    if [ "$asked" -lt 2 ]; then
        kill -s "$1" -- "$container" 2>/dev/null
        return
    fi
    # Only what Apptainer runs: by itself it then unmounts the image. Where it has become
    # the program, or does not come to its end, the whole.
    # shellcheck disable=SC2046  # several numbers
    kill -s KILL $(cat "/proc/$container"/task/*/children 2>/dev/null) 2>/dev/null
    for _ in {1..50}; do
        kill -s 0 -- "$container" 2>/dev/null || return
        sleep 0.1
    done
    kill -s KILL -- "-$container" 2>/dev/null
}

# Run a program in the container and return its exit status. Signals reach it, and when
# it has ended nothing of it is left.
run_in_container() {
    local container='' status=0 answer caught='' asked=0 number
    load_modules
    find_apptainer
    find_image
    find_device
    trap remove_work EXIT
    make_work
    compose "$@"
    if dry_run; then
        printf '%q ' "${COMMAND[@]}"
        printf '\n'
        return 0
    fi
    # shellcheck disable=SC2031
    printf 'job %s on %s: %s, device %s, project %s\n' \
        "${SLURM_JOB_ID:-without Slurm}" "$(hostname)" "$IMAGE" "$DEVICE" "$TOOLKIT_HOME" >&2

    shield_mounts
    # In scratch, since Apptainer takes the working folder, which may be the home, with it.
    cd -- "$WORK" || return 2
    # In the background, since bash runs a trap only after the command in the foreground has
    # ended; as a process group, so that what the program leaves behind can be found.
    for number in HUP INT TERM USR1 USR2; do
        # shellcheck disable=SC2064  # the name is known now
        trap "forward $number" "$number"
    done
    set -m
    "${COMMAND[@]}" </dev/null &
    container=$!
    set +m
    [ -z "$caught" ] || forward "$caught"  # it came before there was a container
    while :; do
        caught=''
        wait "$container"
        answer=$?
        # 127: it had ended before, and its status was already told.
        [ "$answer" = 127 ] && [ "$asked" != 0 ] || status=$answer
        [ -n "$caught" ] || break
    done
    trap - HUP INT TERM USR1 USR2
    kill -s KILL -- "-$container" 2>/dev/null
    return "$status"
}
