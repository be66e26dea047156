#!/bin/bash
# Check this node for job.sh, which sets the variables: RESULTS/NODE.json is the report and
# appears when it is whole, RESULTS/NODE.log is what went wrong.

set -u
node=${SLURMD_NODENAME:-$(hostname -s)}
report=$RESULTS/$node.json

read -r -a options <<<"${DEVICE_CHECK_OPTIONS:-}"
[ -z "${TOOLKIT_DEVICE:-}" ] || options=("--$TOOLKIT_DEVICE" "${options[@]}")
[ -z "${IMAGE:-}" ] || options+=(--image "$IMAGE")

timeout --kill-after=10 "$SECONDS_EACH" "$TOOLKIT_HOME/.venv/bin/python" -I -m toolkit check \
    --json "${options[@]//%n/$node}" >"$report.part" 2>"$RESULTS/$node.log" </dev/null
status=$?
case $status in
    0 | 1) mv -- "$report.part" "$report" && sync -- "$report" && exit 0 ;;
    124 | 137) echo "the check did not end within $SECONDS_EACH s" >>"$RESULTS/$node.log" ;;
    *) echo "the check ended with exit status $status" >>"$RESULTS/$node.log" ;;
esac
rm -f -- "$report.part"
exit 1
