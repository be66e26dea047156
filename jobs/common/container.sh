# shellcheck shell=bash
# The container: its program, image, devices, variables and command line.

# What programs keep between runs, below /cache: MIOpen's and Triton's must not be on a shared
# file system, and none of it in the home.
CACHES=(MIOPEN_USER_DB_PATH=miopen MIOPEN_CUSTOM_CACHE_DIR=miopen TRITON_CACHE_DIR=triton
    TORCHINDUCTOR_CACHE_DIR=inductor TORCH_EXTENSIONS_DIR=torch_extensions
    PYTORCH_KERNEL_CACHE_PATH=torch_kernels CUDA_CACHE_PATH=cuda NUMBA_CACHE_DIR=numba
    MPLCONFIGDIR=matplotlib XDG_CACHE_HOME=xdg)

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
    local build=${TOOLKIT_BUILD_DIR:-build} given=${IMAGE:-} make="make build-monai-sif"
    [[ $build == /* ]] || build=$TOOLKIT_HOME/$build
    if [ -n "${DEFAULT_IMAGE:-}" ]; then
        # The site's image has not what this job needs.
        make="toolkit build $DEFAULT_IMAGE"
    else
        given=${given:-${TOOLKIT_IMAGE:-}}
    fi
    IMAGE=${given:-$build/${DEFAULT_IMAGE:-monai}.sif}
    [[ $IMAGE == /* ]] || IMAGE=$PWD/$IMAGE
    [ -e "$IMAGE" ] || fail "no image $IMAGE" \
        "Make it with \`$make\` in $TOOLKIT_HOME, or name another in IMAGE."
}

# Set IMAGE_OPTIONS to the image as Apptainer is told of it. A thin image is no SIF but a JSON
# file, one key on a line, that names a SIF and the layers to put over it.
image_options() {
    local real base size place layer
    local -a layers=()
    IMAGE_OPTIONS=("$IMAGE")
    [ -f "$IMAGE" ] && [ "$(head -c 1 -- "$IMAGE" | tr -d '\0')" = "{" ] || return 0
    real=$(readlink -f -- "$IMAGE")
    base=$(sed -n 's/^ *"base": *"\([^"\\]*\)",\{0,1\} *$/\1/p' "$real")
    layer=$(sed -n 's/^ *"layer": *"\([^"\\]*\)",\{0,1\} *$/\1/p' "$real")
    [ -n "$base" ] && [ -n "$layer" ] || fail "the thin image $IMAGE names no base or no layer" \
        "Build it again with \`toolkit build --how thin\`."
    while IFS= read -r place; do
        layers+=("$place")
    done < <(sed -n 's/^ *"below": *\[\(.*\)\],\{0,1\} *$/\1/p' "$real" | grep -o '"[^"\\]*"' | tr -d '"')
    layers+=("$layer")
    # It may have moved, but must be the same.
    size=$(sed -n 's/^ *"base_size": *\([0-9]*\),\{0,1\} *$/\1/p' "$real")
    [ -e "$base" ] || base=${TOOLKIT_BASE:-$base}
    [ -e "$base" ] || fail "$base, the base of the thin image $IMAGE, is not on $(hostname)" \
        "Put it back, or name where it is now in TOOLKIT_BASE."
    [ "${size:-0}" = 0 ] || [ "$(stat -L -c %s -- "$base")" = "$size" ] ||
        fail "$base is not the base that the thin image $IMAGE was built on" \
            "Build the image again, or give it back its base."
    IMAGE_OPTIONS=()
    for place in "${layers[@]}"; do
        [[ $place == /* ]] || place=${real%/*}/$place
        [ -e "$place" ] || fail "$place, a layer of the thin image $IMAGE, is not on $(hostname)" \
            "The files belong together; build the image again."
        IMAGE_OPTIONS+=(--overlay "$place:ro")
    done
    IMAGE_OPTIONS+=("$base")
}

# Whether the image has layers: files beside its base, or overlay partitions.
layered() {
    [ ${#IMAGE_OPTIONS[@]} -gt 1 ] || "$APPTAINER" sif list "$IMAGE" 2>/dev/null | grep -q /Overlay/
}

# Where Apptainer cannot mount it starts the base of a layered image alone, without a word.
unpack_layers() {
    local toolkit=$TOOLKIT_HOME/.venv/bin/toolkit
    { [ -x "$toolkit" ] && "$toolkit" unpack "$IMAGE" "$WORK/root" >/dev/null; } ||
        fail "$(hostname) cannot mount images, and the layers of $IMAGE could not be unpacked" \
            "Build it with \`toolkit build --how full\`, or have /dev/fuse opened to users."
    IMAGE_OPTIONS=("$WORK/root")
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

DEVICE_FOUND=''  # whether that was done

# Set DEVICE.
find_device() {
    local found
    [ -z "$DEVICE_FOUND" ] || return 0
    DEVICE_FOUND=1
    found=$(detect_device)
    DEVICE=${TOOLKIT_DEVICE:-$found}
    [ "$DEVICE" != auto ] || DEVICE=$found
    case $DEVICE in
        rocm | cuda | hpu | cpu) ;;
        *) fail "the device (TOOLKIT_DEVICE) is $DEVICE, it must be rocm, cuda, hpu or cpu" ;;
    esac
    if [ "$DEVICE" != cpu ] && [ "$DEVICE" != "$found" ] && ! dry_run; then
        printf 'warning: %s has no device files for %s: the program will find no device\n' \
            "$(hostname)" "$DEVICE" >&2
    fi
}

# Print Gaudi's device files below a root folder, with those of its network ports.
gaudi_files() {
    local root=${1:-} file
    for file in "$root"/dev/accel/* "$root"/dev/hl[0-9]* "$root"/dev/hl_controlD*; do
        [ ! -e "$file" ] || printf '%s\n' "${file#"$root"}"
    done
    for file in "$root"/sys/class/infiniband/{hbl,hlib}_*/device/infiniband_verbs/*; do
        file=/dev/infiniband/${file##*/}
        [ ! -e "$root$file" ] || printf '%s\n' "$file"
    done
}

# Add to COMMAND what Gaudi needs of a program that calls itself by the text $1.
gaudi_options() {
    local file name
    if [[ $1 =~ ^apptainer\ version\ ([0-9]+)\.([0-9]+) ]] &&
        ((BASH_REMATCH[1] * 1000 + BASH_REMATCH[2] >= 1005)); then
        COMMAND+=(--intel-hpu)
    else
        # Gaudi's library wants each file by itself; the folder as a whole is not enough.
        while IFS= read -r file; do
            COMMAND+=(--bind "$file")
        done < <(gaudi_files)
    fi
    # The image's own are gone with the host's environment, or name a folder that is read-only.
    dry_run || mkdir -p "$WORK/tmp/habana_logs"
    for name in GC_KERNEL_PATH=/usr/lib/habanalabs/libtpc_kernels.so HABANA_LOGS=/tmp/habana_logs \
        HABANA_PLUGINS_LIB_PATH=/opt/habanalabs/habana_plugins \
        HABANA_SCAL_BIN_PATH=/opt/habanalabs/engines_fw PT_HPU_LAZY_MODE="${PT_HPU_LAZY_MODE:-0}"; do
        [[ " ${TOOLKIT_PASS:-} " == *" ${name%%=*} "* ]] || COMMAND+=(--env "$name")
    done
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

# Make stand-ins for the programs that mount the image, found first on Apptainer's PATH.
# To end a job Slurm sends TERM to all of its processes, and the image would be gone while the
# program still saves its work. They end by themselves when Apptainer unmounts the image.
shield_mounts() {
    local program name found
    program=$(readlink -f -- "$APPTAINER")
    for name in squashfuse_ll squashfuse fuse-overlayfs; do
        found=$(PATH="${program%/*}:$PATH" command -v "$name") || continue
        printf '#!/bin/bash\ntrap "" HUP INT TERM USR1 USR2\nexec %q "$@"\n' "$found" >"$WORK/bin/$name"
        chmod +x "$WORK/bin/$name"
    done
}

# Print the names of the variables that the container shall see.
passed_names() {
    local masks
    compgen -A export SLURM | grep -vx SLURM_CONF  # that file is not there
    printf '%s\n' OMP_NUM_THREADS
    # shellcheck disable=SC2086  # several names
    [ -z "${TOOLKIT_PASS:-}" ] || printf '%s\n' $TOOLKIT_PASS |
        grep -vxE '(ROCR|HIP|CUDA)_VISIBLE_DEVICES|HABANA_VISIBLE_MODULES'
    case $DEVICE in
        # Slurm sets several of these to the same numbers. Within what the first shows, the
        # second counts from 0 again, and no GPU is left: one of them only.
        rocm) masks=(ROCR_VISIBLE_DEVICES HIP_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES) ;;
        hpu) masks=(HABANA_VISIBLE_MODULES) ;;
        *) masks=(CUDA_VISIBLE_DEVICES) ;;
    esac
    for mask in "${masks[@]}"; do
        [ -n "${!mask+set}" ] || continue
        # Set to nothing it hides the GPUs that the job has.
        if [ -z "${!mask}" ] && [ "${SLURM_GPUS_ON_NODE:-0}" != 0 ]; then
            printf 'warning: %s is empty and not passed on\n' "$mask" >&2
            continue
        fi
        printf '%s\n' "$mask"
        break
    done
}

# Set COMMAND to what runs a program in the container.
compose() {
    local prefix=APPTAINERENV version name bind
    local -a binds=()
    version=$("$APPTAINER" --version 2>/dev/null)
    # A real SingularityCE knows its own prefix only; "apptainer" may also be called singularity.
    if [[ $version == singularity* ]]; then
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
    COMMAND+=(--home "$WORK/home:/home/job" --pwd "$FOLDER" --bind "$WORK/tmp:/tmp")
    COMMAND+=(--bind "$RESULTS_HERE:/results" --bind "$WORK/cache:/cache")
    for name in "${CACHES[@]}"; do
        COMMAND+=(--env "${name%%=*}=/cache/${name#*=}")
    done
    COMMAND+=(--env RESULTS=/results)
    for name in "${VARIABLES[@]}"; do
        COMMAND+=(--env "$name")
    done
    case $DEVICE in
        rocm) COMMAND+=(--rocm) ;;
        cuda) COMMAND+=(--nv) ;;
        hpu) gaudi_options "$version" ;;
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
    # shellcheck disable=SC2153  # it is in common.sh
    for bind in "${BINDS[@]}"; do
        COMMAND+=(--bind "$bind")
    done
    image_options
    if ! dry_run && ! can_mount && layered; then
        unpack_layers
    fi
    COMMAND+=("${IMAGE_OPTIONS[@]}" "$@")
}

