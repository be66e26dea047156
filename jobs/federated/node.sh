#!/bin/bash
# Run one envoy on this node for job.sh, which sets the variables; which one, Slurm says.

set -u

# Whatever becomes of the envoy, the driver hears of it.
if [ "${1:-}" != run ]; then
    trap : TERM
    bash "$0" run
    status=$?
    name=envoy-$((${SLURM_PROCID:-0} + 1))
    {
        [ -d "$FEDERATION" ] && echo "$status" >"$FEDERATION/.ended-$name" &&
            mv -- "$FEDERATION/.ended-$name" "$FEDERATION/ended-$name"
    } 2>/dev/null
    exit 0
fi

# shellcheck source=../common.sh
. "$TOOLKIT_HOME/jobs/common.sh"

# shellcheck disable=SC2034  # find_image reads it
DEFAULT_IMAGE=openfl
NAME=envoy-$((${SLURM_PROCID:-0} + 1))
begin_job direct
until [ -e "$FEDERATION/federation.json" ]; do
    [ -d "$FEDERATION" ] && [ ! -e "$FEDERATION/over" ] || exit 0
    sleep 0.3
done
# The key is nowhere but here from now on.
cp -R -- "$FEDERATION/$NAME" "$WORK/certificates" ||
    fail "no certificates for $NAME in $FEDERATION"
remove "$FEDERATION/$NAME"
[ -e "$PLACE" ] || echo "warning: no data at $PLACE on $(hostname)" >&2
find_device
# The envoys of a node share its CPUs.
THREADS=$(($(nproc) / ENVOYS_HERE))
[ "$THREADS" -gt 0 ] || THREADS=1
BINDS+=("$PLACE:/data/${PLACE##*/}:ro" "$FEDERATION:/federation:ro"
    "$WORK/certificates:/certificates:ro")
[ -z "${CODE:-}" ] || BINDS+=("$CODE:/code:ro")
set -m
(
    trap '' TERM
    until [ -e "$FEDERATION/over" ] || [ ! -d "$FEDERATION" ]; do sleep 1; done
    # Time to end by itself, if all is done.
    [ ! -e "$FEDERATION/over" ] || [ -s "$FEDERATION/over" ] || sleep 4
    kill -s TERM -- $$
) &
HELPERS+=($!)
set +m
run_in_container python3 "$JOBS/federated/run.py" envoy --federation /federation \
    --certificates /certificates --rank "${SLURM_PROCID:-0}" --local-rank "${SLURM_LOCALID:-0}" \
    --data "/data/${PLACE##*/}" --device "$DEVICE" --threads "$THREADS" >>"$RESULTS/logs/$NAME.log" 2>&1
