"""Jobs that end in each way on a real Slurm: what they made comes back, what they leave is gone."""

import hashlib
import json
import os
import random
import re
import time
from pathlib import Path

import pytest
import slurm_cluster
from test_jobs_slurm import project, small_sif  # noqa: F401

from toolkit import apptainer, processes

pytestmark = [pytest.mark.slurm, pytest.mark.image]

#: A partition whose jobs give way to those of another.
PREEMPTION = """\
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL PriorityTier=1 MaxTime=01:00:00
PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=01:00:00
"""

#: What every program does first: it looks at its input and writes results of several sizes.
BEGIN = """
cd /results
ls / >/dev/null
cat /input/set/blob >blob
mkdir -p a/b empty
for i in {1..40}; do echo "number $i" >"a/b/file $i"; done
"""

#: The ways: options of sbatch, and the rest of the program.
WAYS = {
    "completed": ([], "exit 0"),
    "failed": ([], "echo last >last; exit 7"),
    "cancelled": ([], "trap 'sleep 0.5; echo saved >last; exit 5' TERM; echo up; sleep 900 & wait"),
    # Killed by what it does not handle, with all that it wrote in the last moment.
    "killed": ([], "echo last >last; echo up; sleep 900"),
    "timeout": (
        ["--time=10", "--signal=B:USR1@10"],
        "trap 'echo saved >checkpoint' USR1; trap 'echo saved >last; exit 5' TERM; echo up;"
        " while :; do sleep 1; done",
    ),
    # It wants to go on by itself, and once more it does.
    "requeued": (
        ["--time=10"],
        "if [ -e n ]; then echo second >>n; exit 0; fi; echo first >n; exit 85",
    ),
    "preempted": (
        ["--time=10", "--partition=low", "--nodelist=n2"],
        "if [ -e n ]; then echo second >>n; exit 0; fi;"
        " [ ${SLURM_RESTART_COUNT:-0} = 0 ] || exit 9;"
        " trap 'echo first >n; exit 143' TERM; echo up; sleep 900 & wait",
    ),
}


def blob():
    return random.Random(5).randbytes(3_000_000)


def wait_for(holds, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return answer


@pytest.fixture(scope="module")
def running():
    with slurm_cluster.cluster(nodes=2, settings=PREEMPTION) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def ended(running, small_sif, tmp_path_factory):  # noqa: F811
    """Jobs of every way, all at once since one must wait for its time limit."""
    slurm_cluster.require()
    folder = tmp_path_factory.mktemp("endings")
    home = project.__wrapped__(folder, small_sif)
    (folder / "set").mkdir()
    (folder / "set/blob").write_bytes(blob())
    jobs = {}
    for way, (options, program) in WAYS.items():
        (folder / f"scratch-{way}").mkdir()
        (folder / f"scratch-{way}/somebody-elses").touch()
        done = running.run(
            "sbatch", "--parsable", "--job-name=own", "--requeue", "--open-mode=append",
            "--gres=none", "--time=5",
            *(["--nodelist=n1"] if way != "preempted" else []), *options,
            home / "jobs/own/job.sh",
            environment={
                "PROGRAM": BEGIN + program, "REQUEUE": "1", "INPUT": str(folder / "set"),
                "TOOLKIT_SCRATCH": str(folder / f"scratch-{way}"),
                "TOOLKIT_RESULTS": str(folder / "results"),
                "TOOLKIT_APPTAINER": str(apptainer.find().path),
                "HOME": str(folder / "home"),
            },
            cwd=folder,
        )  # fmt: skip
        assert done.code == 0, done.stderr
        jobs[way] = done.stdout.strip()

    def log(way):
        path = folder / f"slurm-{jobs[way]}.out"
        return path.read_text() if path.exists() else ""

    def up(way):
        return wait_for(lambda: "\nup\n" in log(way), seconds=120)

    up("preempted")
    high = running.run(
        "sbatch", "--parsable", "--partition=high", "--nodelist=n2", "--exclusive", "--time=5",
        "--output=/dev/null", "--wrap=true", cwd=folder,
    ).stdout.strip()  # fmt: skip
    # Slurm looks every 30 s for jobs at their limit, and warns at least so long before: here when
    # it looks for the first time, even if that is some seconds late.
    up("timeout")
    done = running.run("scontrol", "update", f"JobId={jobs['timeout']}", "EndTime=now+40")
    assert done.code == 0, done.stderr
    for way in ("cancelled", "killed"):
        up(way)
        running.run("scancel", jobs[way])
    # One may have begun again by itself: after two minutes they do.
    for way in ("preempted", "requeued"):
        running.start_again(jobs[way], timeout=240)
    running.finish(high)
    for way in jobs:
        running.finish(jobs[way])
    return folder, jobs, {way: log(way) for way in jobs}


def record(folder, job):
    path = folder / f"results/own-{job}/job.json"
    return json.loads(path.read_text()) if path.exists() else {"state": ""}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_lost_and_nothing_is_left(ended, running, way):
    folder, jobs, logs = ended
    results = folder / f"results/own-{jobs[way]}"
    wait_for(lambda: record(folder, jobs[way])["end"])
    said = logs[way]
    # Everything that the program wrote, by its hash.
    assert hashlib.sha256((results / "blob").read_bytes()).digest() == (
        hashlib.sha256(blob()).digest()
    ), said
    assert {p.name: p.read_text() for p in (results / "a/b").iterdir()} == {
        f"file {i}": f"number {i}\n" for i in range(1, 41)
    }
    assert (results / "empty").is_dir()
    # Nothing else, and nothing in scratch but what was there before.
    ours = {"job.json", "blob", "a", "empty", "last", "checkpoint", "n"}
    assert {p.name for p in results.iterdir()} <= ours
    wait_for(lambda: len(os.listdir(folder / f"scratch-{way}")) == 1)
    assert os.listdir(folder / f"scratch-{way}") == ["somebody-elses"]
    assert not (folder / "home").exists()


@pytest.mark.parametrize(
    ("way", "state", "code", "files"),
    [
        ("completed", "completed", 0, {}),
        ("failed", "failed", 7, {"last": "last\n"}),
        ("cancelled", "cancelled", 5, {"last": "saved\n"}),
        ("killed", "cancelled", 143, {"last": "last\n"}),
        ("timeout", "timeout", 5, {"checkpoint": "saved\n", "last": "saved\n"}),
        ("requeued", "completed", 0, {"n": "first\nsecond\n"}),
        ("preempted", "completed", 0, {"n": "first\nsecond\n"}),
    ],
)
def test_the_record_tells_how_it_ended(ended, way, state, code, files):
    folder, jobs, logs = ended
    results = folder / f"results/own-{jobs[way]}"
    found = record(folder, jobs[way])
    assert (found["state"], found["exit_code"]) == (state, code), logs[way]
    assert {name: (results / name).read_text() for name in files} == files
    assert set(found) == {
        "job_id", "name", "host", "start", "image", "results", "scratch", "log", "state",
        "exit_code", "end",
    }  # fmt: skip
    assert found["job_id"] == jobs[way]
    assert found["results"] == str(results)
    assert found["log"] == str(folder / f"slurm-{jobs[way]}.out")
    assert found["start"] <= found["end"]  # a second is the same where it goes on at once


@pytest.mark.parametrize("way", ["requeued", "preempted"])
def test_the_log_of_the_first_run_is_kept(ended, way):
    _, _, logs = ended
    ends = re.findall(r"^(\w+): results in ", logs[way], re.M)
    assert ends == ["requeued", "completed"], logs[way]


def test_results_are_where_slurm_says_too(ended, running):
    folder, jobs, _ = ended
    facts = running.show(jobs["failed"])
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "7:0")
    assert running.show(jobs["timeout"])["JobState"] == "TIMEOUT"
    assert Path(facts["StdOut"]).parent == folder


# Several processes

#: All meet; then number 1 fails, or each ends when it is warned.
SCRIPT = """
import os, signal, sys, time
import torch
import torch.distributed as dist

saved = []
signal.signal(signal.SIGUSR1, lambda *_: saved.append(1))
dist.init_process_group("gloo")
rank = dist.get_rank()
total = torch.ones(1)
dist.all_reduce(total)
print("rank", rank, "local", os.environ["LOCAL_RANK"], "sees", int(total), flush=True)
if sys.argv[1] == "fail" and rank == 1:
    sys.exit("no such label")
while True:
    if sys.argv[1] == "save":
        if saved:
            open("saved-%d" % rank, "w").close()
            sys.exit(85)
    else:
        dist.all_reduce(total)
    time.sleep(0.1)
"""


@pytest.fixture
def distributed(running, tmp_path, monai_sif):
    """Run the job of several processes; return its number, its log and its folder."""

    def run(*options, argument, act=None, **environment):
        (tmp_path / "train.py").write_text(SCRIPT)
        (tmp_path / "scratch").mkdir()
        done = running.run(
            "sbatch", "--parsable", "--gres=gpu:1", *options,
            Path(__file__).parents[1] / "jobs/distributed/job.sh", "train.py", argument,
            environment={
                "IMAGE": str(monai_sif), "TOOLKIT_APPTAINER": str(apptainer.find().path),
                "TOOLKIT_SCRATCH": str(tmp_path / "scratch"), **environment,
            },
            cwd=tmp_path,
        )  # fmt: skip
        assert done.code == 0, done.stderr
        job = done.stdout.strip()
        log = tmp_path / f"slurm-{job}.out"
        if act:
            wait_for(lambda: log.exists() and log.read_text().count("sees 2") == 2, seconds=200)
            act(job)
        facts = running.finish(job)
        folder = tmp_path / f"results/distributed-{job}"
        wait_for(lambda: json.loads((folder / "job.json").read_text())["end"])
        assert not list((tmp_path / "scratch").iterdir())
        return facts, log.read_text(), folder

    return run


def test_the_process_that_fails_first_ends_the_job(distributed):
    """Two nodes, a task on each."""
    facts, log, folder = distributed("--nodes=2", argument="fail", PROCESSES="1")
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "1:0"), log
    assert "rank 0 local 0 sees 2" in log
    assert "rank 1 local 0 sees 2" in log
    assert re.search(
        r"^error: rank 1 on n2 failed first, with exit status 1\n  no such label$", log, re.M
    ), log
    found = json.loads((folder / "job.json").read_text())
    assert (found["state"], found["exit_code"]) == ("failed", 1)
    assert [path.name for path in folder.iterdir()] == ["job.json"]


#: Number 1 fails in some way, the others know nothing of it.
DIE = """
import os, sys, time
print("rank", os.environ["RANK"], flush=True)
if os.environ["RANK"] == "1":
    time.sleep(2)
    if sys.argv[1] == "silent":
        os._exit(7)
    sys.exit(9)
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("how", "status", "why"),
    [
        ("silent", 7, "The process ended with exit status 7, without a word of its own."),
        ("told", 9, "It ended itself."),
    ],
)
def test_who_failed_is_told_from_those_that_were_ended(tmp_path, monai_sif, how, status, why):
    """Several processes of one torchrun, without Slurm."""
    (tmp_path / "die.py").write_text(DIE)
    done = processes.run(
        ["bash", Path(__file__).parents[1] / "jobs/distributed/job.sh", "die.py", how],
        environment={
            "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "IMAGE": str(monai_sif),
            "TOOLKIT_APPTAINER": str(apptainer.find().path), "PROCESSES": "3",
        },
        cwd=tmp_path,
    )  # fmt: skip
    assert done.code == status, done.stderr
    assert re.search(
        rf"^error: rank 1 on \S+ failed first, with exit status {status}\n  {why}$",
        done.stderr,
        re.M,
    ), done.stderr


def test_every_process_is_warned_and_saves(distributed, running):
    """One node, a task for each process."""
    facts, log, folder = distributed(
        "--nodes=1", "--ntasks=2", "--gres=gpu:2", argument="save",
        act=lambda job: running.run("scancel", "--batch", "--signal=USR1", job),
    )  # fmt: skip
    assert facts["ExitCode"] == "85:0", log
    assert {path.name for path in folder.iterdir()} == {"job.json", "saved-0", "saved-1"}
    assert json.loads((folder / "job.json").read_text())["state"] == "timeout"
