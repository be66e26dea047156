"""Run a script by torchrun, as many times as this task is to, and tell which failed first, and why.

It runs twice: started by node.sh it starts the processes, and as each of them it runs the script.
What they leave in /failures is for job.sh.
"""

import os
import runpy
import signal
import sys
import time
import traceback
from typing import Any, Dict, List, Tuple

#: Exit status of a program that has saved its state and wants to go on in a new run.
AGAIN = 85

#: Seconds that torchrun gives processes to end before it kills them.
PATIENCE = 30


def start() -> None:
    """Run torchrun; end with a status of its own processes."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    tasks, nodes, count = int(os.environ["TASKS"]), int(os.environ["NODES"]), processes()
    if tasks > nodes:
        os.environ["OWN_LOCAL_RANK"] = local_rank()
    # torchrun would give each process one.
    cpus = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus // count)))
    options = [
        "--nnodes=%d" % tasks,
        "--node-rank=%s" % os.environ.get("SLURM_PROCID", 0),
        "--nproc-per-node=%d" % count,
        "--master-addr=" + os.environ["MASTER_ADDR"],
        "--master-port=" + os.environ["MASTER_PORT"],
        "--max-restarts=0",
        "--monitor-interval=0.2",
    ]
    try:
        run(parse_args([*options, os.path.abspath(__file__), *sys.argv[1:]]))
    except ChildFailedError as error:
        for place, (rank, failure) in enumerate(own_failures(error.failures)):
            status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
            if not os.path.exists("/failures/rank-%d" % rank):
                # It had no time to tell, unlike those that fail because another one did.
                how = "ended with exit status %d" % status
                if failure.exitcode < 0:
                    how = "was killed by " + signal.Signals(-failure.exitcode).name
                why = "The process %s, without a word of its own." % how
                note(rank, status, float(place), why)
        sys.exit(1)
    except SignalException as error:
        sys.exit(128 + error.sigval)


def own_failures(failures: Dict[int, Any]) -> List[Tuple[int, Any]]:
    """Return rank and failure of the processes that torchrun did not end itself.

    When it finds one dead it sends SIGTERM to the others, half a minute later SIGKILL, and tells
    of them, too, behind what it found first. A process that fails of that by itself is not told
    from one that was the first.
    """
    found: List[Tuple[int, Any]] = []
    for rank, failure in failures.items():
        first = found[0][1].timestamp if found else failure.timestamp
        asked = failure.exitcode == -signal.SIGTERM
        killed = failure.exitcode == -signal.SIGKILL and failure.timestamp - first > PATIENCE / 2
        if not found or not (asked or killed):
            found.append((rank, failure))
    return found


def processes() -> int:
    """Return how many processes this task starts: as said, else one for each of the GPUs."""
    import torch

    for name in ("PROCESSES", "SLURM_GPUS_ON_NODE"):
        if os.environ.get(name, "0") != "0":
            return int(os.environ[name])
    return torch.cuda.device_count() or 1


def local_rank() -> str:
    """Return the device's number for a task that is one process, or "" if it sees only its own."""
    for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        if name in os.environ:
            return os.environ.get("SLURM_LOCALID", "") if "," in os.environ[name] else ""
    return os.environ.get("SLURM_LOCALID", "") if os.path.exists("/dev/kfd") else ""


def script() -> None:
    """Run the script as Python itself would; leave word if it fails."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = os.environ.pop("OWN_LOCAL_RANK", "") or os.environ["LOCAL_RANK"]
    del sys.argv[0]
    sys.path[0] = os.path.dirname(sys.argv[0])
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = 1
        if end.code is None or isinstance(end.code, int):
            status = (end.code or 0) % 256  # all that a process can end with
        if status == 0:
            return
        if status == AGAIN:
            # No failure, for which torchrun would end the others while they still save.
            with open("/failures/again", "w"):
                return
        note(rank, status, time.time(), "It ended itself." if status == end.code else str(end.code))
        raise
    except BaseException as error:
        # Less what is between Python and the script.
        inner = error.__traceback__
        while inner and inner.tb_frame.f_code.co_filename != sys.argv[0]:
            inner = inner.tb_next
        lines = traceback.format_exception(type(error), error, inner)
        note(rank, 1, time.time(), "".join(lines))
        raise


def note(rank: int, status: int, when: float, why: str) -> None:
    """Leave for job.sh when and why a process failed."""
    with open("/failures/why-%d" % rank, "w") as stream:
        stream.write(why.rstrip() + "\n")
    with open("/failures/.rank-%d" % rank, "w") as stream:
        stream.write("%.6f %d %d %s\n" % (when, status, rank, os.environ["NODE"]))
    os.replace("/failures/.rank-%d" % rank, "/failures/rank-%d" % rank)


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        script()
    else:
        start()
