#!/bin/bash
# Check this node for Slurm, and drain it if its devices are broken: a HealthCheckProgram
# or a Prolog of slurmd. docs/health.md shows how it is set up.
#
#   HEALTH_CHECK_OPTIONS   options for `toolkit check`, such as "--rocm --expect 8"
#   HEALTH_CHECK_SECONDS   its time, by default 45: slurmd ends such a program after 60
#   HEALTH_CHECK_LOG       file to which the verdict is added; by default syslog
#   TOOLKIT_HOME           the project; by default the one that this file is in
#
# Exit status: 0 the node is well, or well enough; 2 it is broken; 3 the check could not tell,
# and the node is left as it is (0 in a prolog, whose failure would drain the node).

set -u
# Slurm gives its programs next to no environment.
PATH=${PATH:-/usr/bin:/bin}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
export PATH PYTHONDONTWRITEBYTECODE=1 HOME="${HOME:-/}"

node=${SLURMD_NODENAME:-$(hostname -s)}
home=${TOOLKIT_HOME:-$(cd -- "$(dirname -- "$0")/../.." && pwd)}
seconds=${HEALTH_CHECK_SECONDS:-45}

say() {
    if [ -n "${HEALTH_CHECK_LOG:-}" ]; then
        printf '%s %s: %s\n' "$(date +%FT%T)" "$node" "$1" >>"$HEALTH_CHECK_LOG"
    elif command -v logger >/dev/null; then
        logger -t toolkit-health -- "$node: $1"
    fi
    printf '%s: %s\n' "$node" "$1" >&2
}

unknown() {
    say "UNKNOWN - $1; the node is left as it is"
    # A prolog has the job's number, a HealthCheckProgram has none.
    [ -z "${SLURM_JOB_ID:-}" ] || exit 0
    exit 3
}

# Make a text one that scontrol takes and sinfo shows as it is.
clean() {
    local text
    text=$(printf '%s' "$1" | tr -c ' -~' ' ' | tr -d "\"'\`\\\\" | tr -s ' ')
    printf '%s' "${text:0:200}"
}

drain() {
    local shown
    shown=$(timeout 10 scontrol --oneliner show node "$node" 2>&1) || {
        say "cannot drain the node: $(clean "$shown")"
        return
    }
    # Somebody, or an earlier check, has said why already: theirs is the reason to keep.
    case $shown in
        *State=*DRAIN*' Reason='* | *State=*DOWN*' Reason='* | *State=*FAIL*' Reason='*) return ;;
    esac
    shown=$(timeout 10 scontrol update nodename="$node" state=drain reason="$1" 2>&1) ||
        say "cannot drain the node: $(clean "$shown")"
}

python=$home/.venv/bin/python
[ -x "$python" ] || unknown "there is no $python; run \`make venv\` in $home"
read -r -a options <<<"${HEALTH_CHECK_OPTIONS:-}"
answer=$(timeout --kill-after=5 "$seconds" "$python" -I -m toolkit check --monitoring \
    "${options[@]}" 2>&1 </dev/null)
status=$?
verdict=${answer%%$'\n'*}
# The word, too: a Python that cannot start may end with any of these numbers.
case $status:$verdict in
    0:OK\ * | 1:WARNING\ *)
        say "$verdict"
        exit 0
        ;;
    2:CRITICAL\ *)
        say "$verdict"
        drain "toolkit check: $(clean "${verdict#CRITICAL - }")"
        exit 2
        ;;
    124:* | 137:*) unknown "the check did not end within $seconds s" ;;
    3:UNKNOWN\ *) unknown "$(clean "${verdict#UNKNOWN - }")" ;;
    *) unknown "the check ended with exit status $status: $(clean "$answer")" ;;
esac
