#!/bin/bash
# Start this node's processes, or the one of this task, for job.sh, which sets the variables.

set -u
# shellcheck source=../common.sh
. "$TOOLKIT_HOME/jobs/common.sh"

begin_job direct
own_program "$@"
[ "${PROGRAM[0]}" = python3 ] || fail "not a Python script: $1" "Name a file *.py."
start_in /results
TASKS=${SLURM_STEP_NUM_TASKS:-1} NODES=${SLURM_STEP_NUM_NODES:-1}
VARIABLES+=("MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}" "MASTER_PORT=${MASTER_PORT:-29500}"
    "TASKS=$TASKS" "NODES=$NODES" "NODE=${SLURMD_NODENAME:-$(hostname -s)}")
if [ "$TASKS" -gt "$NODES" ]; then
    VARIABLES+=(PROCESSES=1)
elif [ -n "${PROCESSES:-}" ]; then
    VARIABLES+=("PROCESSES=$PROCESSES")
fi
if ! dry_run; then
    BINDS+=("$FAILURES:/failures")
    set -m
    (
        until [ -e "$FAILURES/warned" ]; do sleep 2; done
        kill -s USR1 -- $$
    ) &
    HELPERS+=($!)
    set +m
fi
run_in_container python3 "$JOBS/distributed/launch.py" "${PROGRAM[@]:1}"
