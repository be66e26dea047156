"""``toolkit status`` and ``toolkit logs`` on jobs of a real Slurm."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster

from toolkit import cli, processes, slurm, watch
from toolkit.errors import ToolkitError

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[1]
# The file of completed jobs stands in for the accounting, which needs a database.
SETTINGS = """\
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.log
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
PartitionName=urgent Nodes=ALL PriorityTier=10 MaxTime=01:00:00 State=UP
"""

RECORD = """
mkdir -p results/$SLURM_JOB_NAME-$SLURM_JOB_ID
printf '{"job_id": "%s", "name": "%s", "state": "%s", "exit_code": %s}' \
    $SLURM_JOB_ID $SLURM_JOB_NAME completed 0 >results/$SLURM_JOB_NAME-$SLURM_JOB_ID/job.json
"""
# What each job runs, and the options that it is submitted with.
JOBS: dict[str, tuple[str, list[str]]] = {
    "victim": ("sleep 900", ["--nodelist=n2", "--exclusive"]),
    "overtime": ("echo going; sleep 900", ["--nodelist=n1"]),
    "unwanted": ("echo; sleep 900", []),
    "good": (f"echo one; echo two; {RECORD}", []),
    "bad": ("echo 'ValueError: no data in /x' >&2; echo; exit 3", []),
    "killed": ("exit 137", []),
    "split": ("echo out; echo err >&2", ["--output=%x-%j.log", "--error=%4j_%N.err"]),
    "nowhere": ("echo", ["--output=/nonexistent/%j.out"]),
    "array": ("echo task $SLURM_ARRAY_TASK_ID", ["--array=1-2"]),
    "long": ("echo", ["--time=2:00:00"]),
    "held": ("echo", ["--hold"]),
    "later": ("echo", ["--begin=now+1hour"]),
    "rerun": ("echo run $((SLURM_RESTART_COUNT)); ((SLURM_RESTART_COUNT)) || sleep 900", []),
}  # fmt: skip


@pytest.fixture(scope="module")
def private():
    slurm_cluster.require()
    with slurm_cluster.cluster(nodes=2, settings=SETTINGS) as running:
        yield running


@pytest.fixture(scope="module")
def ids(private, tmp_path_factory):
    """Every job of these tests, submitted at once: by name its number."""
    folder = tmp_path_factory.mktemp("work") / "a project=1"
    folder.mkdir()
    numbers = {"folder": str(folder)}

    def submit(name, program, *options):
        script = folder / name
        script.write_text(f"#!/bin/bash\n{program}\n")
        done = private.run("sbatch", "--parsable", *options, script, cwd=folder)
        assert done.code == 0, done.stderr
        numbers[name] = done.stdout.strip()

    for name, (program, options) in JOBS.items():
        submit(name, program, *options)
    submit("dependent", "echo", f"--dependency=afterok:{numbers['bad']}")
    private.wait_for(numbers["overtime"], "RUNNING")
    # Slurm's limits are whole minutes; it looks at them every half.
    done = private.run("scontrol", "update", f"jobid={numbers['overtime']}", "endtime=now+1")
    assert done.code == 0, done.stderr
    private.wait_for(numbers["victim"], "RUNNING")
    submit("urgent", "echo", "--partition=urgent", "--nodelist=n2", "--exclusive")
    return numbers


@pytest.fixture(autouse=True)
def here(private, ids, monkeypatch):
    """Work in the folder of the jobs as somebody logged in to the cluster."""
    monkeypatch.chdir(ids["folder"])
    monkeypatch.delenv("TOOLKIT_RESULTS", raising=False)
    for name, value in private.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # What a user wishes for their own eyes must not matter.
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")


def one(job_id):
    found = watch.look(job_id)
    assert not found.troubles
    (job,) = found.jobs
    return job


@pytest.fixture
def toolkit(capsys, monkeypatch):
    """Call the command line; return its exit status, what it printed and what it complained of."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["toolkit", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return processes.Result(int(ended.value.code or 0), *capsys.readouterr())

    return call


def test_completed(private, ids, toolkit):
    private.finish(ids["good"])
    job = one(ids["good"])
    assert job.verdict.kind == "completed"
    assert job.facts.status == 0
    assert job.facts.nodes == "n1"
    assert Path(job.results) == Path(ids["folder"]) / f"results/good-{ids['good']}"
    done = toolkit("status", ids["good"])
    assert done.code == 0, done.stderr
    assert "verdict   completed" in done.stdout
    assert f"results   {job.results}" in done.stdout


def test_failed(private, ids, toolkit):
    private.finish(ids["bad"])
    done = toolkit("status", ids["bad"], "--json")
    assert done.code == 0, done.stderr
    job = json.loads(done.stdout)
    assert (job["verdict"], job["exit_code"]) == ("failed", 3)
    assert job["last_error"] == "ValueError: no data in /x"
    assert "exit status 3" in job["summary"]
    assert job["log"] == f"{ids['folder']}/slurm-{ids['bad']}.out"


def test_killed(private, ids):
    private.finish(ids["killed"])
    verdict = one(ids["killed"]).verdict
    assert verdict.kind == "out-of-memory"
    assert "probably" in verdict.text


def test_never_started(private, ids):
    private.finish(ids["nowhere"])
    verdict = one(ids["nowhere"]).verdict
    assert verdict.kind == "never-started"
    assert f"/nonexistent/{ids['nowhere']}.out" in verdict.text


def test_cancelled(private, ids):
    private.wait_for(ids["unwanted"], "RUNNING")
    private.run("scancel", ids["unwanted"])
    private.finish(ids["unwanted"])
    assert one(ids["unwanted"]).verdict.kind == "cancelled"


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("long", "stuck", "01:00:00 in short (PartitionTimeLimit)"),
        ("held", "stuck", "its owner holds it back (JobHeldUser)"),
        ("later", "waiting", "Slurm expects to start it at 20"),
        ("dependent", "stuck", "(DependencyNeverSatisfied)"),
    ],
)
def test_waiting(private, ids, name, kind, words, toolkit):
    private.finish(ids["bad"])
    deadline = time.monotonic() + 120
    while words not in (job := one(ids[name])).verdict.text and time.monotonic() < deadline:
        time.sleep(0.3)  # until the scheduler has looked at it
    assert job.verdict.kind == kind
    assert words in job.verdict.text
    done = toolkit("logs", ids[name])
    assert done.code == 1
    assert "--follow waits for it" in done.stderr


def test_array(private, ids, toolkit):
    for task in ("1", "2"):
        private.finish(f"{ids['array']}_{task}")
    kinds = {job.facts.job_id: job.verdict.kind for job in watch.look(ids["array"]).jobs}
    assert kinds == {f"{ids['array']}_{n}": "completed" for n in (1, 2)}
    done = toolkit("logs", f"{ids['array']}_2")
    assert (done.code, done.stdout) == (0, "task 2\n")
    done = toolkit("logs", ids["array"])
    assert done.code == 2
    assert f"Name one: {ids['array']}_" in done.stderr


def test_two_logs(private, ids, toolkit):
    private.finish(ids["split"])
    assert toolkit("logs", ids["split"]).stdout == "out\n"
    assert toolkit("logs", ids["split"], "--error").stdout == "err\n"


def test_last_lines(private, ids, toolkit):
    private.finish(ids["good"])
    assert toolkit("logs", ids["good"], "--lines", "1").stdout == "two\n"
    assert toolkit("logs", ids["good"]).stdout == "one\ntwo\n"


def test_components_of_a_heterogeneous_job(private, ids):
    script = Path(ids["folder"]) / "good"
    done = private.run(
        "sbatch", "--parsable", "--hold", "-n1", ":", "-n1", script, cwd=script.parent
    )
    number = done.stdout.strip()
    assert [job.facts.job_id for job in watch.look(number).jobs] == [f"{number}+0", f"{number}+1"]
    assert one(f"{number}+1").verdict.kind == "stuck"
    private.run("scancel", number)


def test_unknown_job(ids, toolkit):
    done = toolkit("status", "999999")
    assert done.code == 1
    assert "no job 999999: Slurm does not know it" in done.stderr
    assert toolkit("logs", "999999").code == 1
    assert toolkit("status", f"{ids['array']}_77").code == 1


def test_file_of_completed_jobs(private, ids):
    """What sacct prints of a real file, read as its output on a cluster with accounting."""
    private.finish(ids["bad"])
    (facts,) = slurm.accounting(job_id=ids["bad"])
    assert (facts.state, facts.status, facts.signal) == ("FAILED", 3, 0)
    assert (facts.name, facts.nodes, facts.limit) == ("bad", "n1", "01:00:00")
    assert ids["bad"] in {f.number for f in slurm.accounting(since="2020-01-01T00:00:00")}


def test_follow_a_job_that_is_put_back_into_the_queue(private, ids):
    number = ids["rerun"]
    private.wait_for(number, "RUNNING")
    process = subprocess.Popen(
        [sys.executable, "-m", "toolkit", "logs", number, "--follow"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "run 0\n"
    private.run("scontrol", "requeue", number)
    private.start_again(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.endswith("run 1\n")
    assert "begins anew" in err
    assert f"job {number} completed" in err


def test_an_interruption_leaves_the_job_alone(private, ids):
    process = subprocess.Popen(
        [sys.executable, "-m", "toolkit", "logs", ids["later"], "--follow"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert re.match(rf"job {ids['later']} waits: ", process.stderr.readline())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert private.show(ids["later"])["JobState"] == "PENDING"


def test_follow_until_cancelled(private, ids):
    number = ids["held"]
    said: list[str] = []

    def say(line):
        said.append(line)
        private.run("scancel", number)

    with pytest.raises(ToolkitError, match=f"job {number} has no log .* never started"):
        watch.follow(number, write=lambda _: None, say=say)
    assert "cannot start: its owner holds it back" in said[0]


def test_all_jobs(private, ids, toolkit):
    private.finish(ids["good"])
    listed = {job.facts.job_id: job for job in watch.look_around().jobs}
    assert listed[ids["good"]].results
    assert listed[ids["long"]].verdict.kind == "stuck"
    done = toolkit("status")
    assert done.code == 0, done.stderr
    assert re.search(rf"^{ids['long']} +long +PENDING .*PartitionTimeLimit", done.stdout, re.M)
    assert "timelimit=01:00:00" in done.stdout
    assert {job["name"] for job in json.loads(toolkit("status", "--json").stdout)} >= set(JOBS)


def test_preempted(private, ids):
    private.wait_for(ids["victim"], "PREEMPTED")
    assert one(ids["victim"]).verdict.kind == "preempted"


def test_node_failure(private, ids):
    private.finish(ids["urgent"])
    done = private.run("sbatch", "--parsable", "--no-requeue", "--nodelist=n2", "--wrap=sleep 900")
    number = done.stdout.strip()
    private.wait_for(number, "RUNNING")
    private.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    private.finish(number)
    job = one(number)
    assert job.verdict.kind == "node-failure"
    assert "--exclude=n2" in job.verdict.remedy


def test_timed_out(private, ids):
    """The last, since the limit is checked only every half minute."""
    said: list[str] = []
    out: list[bytes] = []
    job = watch.follow(ids["overtime"], write=out.append, say=said.append)
    assert job.verdict.kind == "timeout"
    assert "up to 01:00:00 in partition short" in job.verdict.remedy
    assert b"".join(out).startswith(b"going\n")
    assert b"DUE TO TIME LIMIT" in b"".join(out)
