"""The verdict on a job, from what Slurm, its record and its log say."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from toolkit import cli, slurm, status
from toolkit.errors import ToolkitError, UsageError
from toolkit.records import Record
from toolkit.sites import Partition
from toolkit.slurm import Facts

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"gpu": Partition(max_minutes=1440), "free": Partition(max_minutes=0)}

# The first is recorded from Slurm 22.05.8; the other logs are put together after the sources
# of the versions that they are named by (src/slurmd/slurmstepd/req.c, src/plugins/task/cgroup).
LOGS = {
    "requeue 22.05": "run 0\nslurmstepd-n1: error: *** JOB 1 ON n1 CANCELLED AT"
    " 2026-11-21T15:55:42 DUE TO JOB REQUEUE ***\n",
    "time 20.11": "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2020-12-01T10:02:00 DUE TO TIME"
    " LIMIT ***\n",
    "preemption 24.05": "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2024-12-01T10:02:00 DUE TO"
    " PREEMPTION ***\n",
    "node 22.05": "slurmstepd: error: *** JOB 7 ON n3 CANCELLED AT 2024-12-01T10:02:00 DUE TO NODE"
    " FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***\n",
    "cancel 22.05": "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2024-12-01T10:02:00 ***\n",
    "memory 20.11": "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.batch cgroup. Some"
    " of your processes may have been killed by the cgroup out-of-memory handler.\n",
    "memory 22.05": "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.batch. Some of"
    " your processes may have been killed by the cgroup out-of-memory handler.\n",
    "memory 24.05": "slurmstepd: error: Detected 2 oom_kill events in StepId=7.batch. Some of the"
    " step tasks have been OOM Killed.\n",
    "memory limit": "slurmstepd: error: StepId=7.0 exceeded memory limit (9 > 8), being killed\n",
    "memory python": "Traceback (most recent call last):\n  File x\nMemoryError\n",
    "memory worker": "RuntimeError: DataLoader worker (pid 4) is killed by signal: Killed. \n",
    "gpu": "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2.00 GiB. GPU 0 has\n",
    "error": "epoch 1\nTraceback (most recent call last):\nKeyError: 'train'\nleaving\n"
    "failed: results in /r/mednist-7\n",
}


def facts(state, **known):
    return Facts(**({"job_id": "7", "nodes": "n1", "partition": "gpu", "state": state} | known))


def judge(given, log="", record=None):
    lines = LOGS.get(log, log).splitlines()
    names = {"1000": "ada"}
    return status.judge(given, log=lines, record=record, limits=LIMITS, user_name=names.__getitem__)


@pytest.mark.parametrize(
    ("given", "log", "kind", "text", "remedy"),
    [
        (facts("COMPLETED", elapsed="00:10:00"), "memory 22.05", "completed",
         "completed after 00:10:00", ""),
        (facts("COMPLETED", out_of_memory=True), "", "out-of-memory", "though it ended well", ""),
        (facts("TIMEOUT", limit="00:10:00"), "", "timeout", "its time limit of 00:10:00",
         "up to 1-00:00:00 in partition gpu"),
        (facts("TIMEOUT", limit="1-00:00:00"), "", "timeout", "", "in another partition"),
        (facts("TIMEOUT", limit="1-00:00:00", partition="free"), "", "timeout", "",
         "with a longer `-- --time=`;"),
        (facts("TIMEOUT", limit="UNLIMITED"), "", "timeout", "", "from the last"),
        (facts("DEADLINE"), "", "timeout", "by its deadline", "later --deadline"),
        (facts("DEADLINE", nodes=""), "", "never-started", "before its deadline", "--time"),
        (facts("OUT_OF_MEMORY", signal=125, memory_asked="4G", memory_used="4193032K"), "",
         "out-of-memory", "asked for 4G; at most 4193032K were seen", "--mem="),
        (facts("FAILED", status=1, out_of_memory=True), "", "out-of-memory", "more memory", ""),
        (facts("FAILED", status=1), "memory 20.11", "out-of-memory", "its log says so", "--mem="),
        (facts("FAILED", status=1), "memory 22.05", "out-of-memory", "its log says so", ""),
        (facts("FAILED", status=1), "memory 24.05", "out-of-memory", "its log says so", ""),
        (facts("FAILED", status=1), "memory limit", "out-of-memory", "its log says so", ""),
        (facts("FAILED", status=1), "memory python", "out-of-memory", "its log says so", ""),
        (facts("FAILED", status=1), "memory worker", "out-of-memory", "its log says so", ""),
        (facts("FAILED", status=1), "gpu", "out-of-memory", "of a GPU", "smaller batches"),
        (facts("FAILED", status=137), "", "out-of-memory", "probably", "--mem="),
        (facts("FAILED", status=0, signal=9), "", "out-of-memory", "probably", ""),
        # sacct takes 128 from the status; scontrol does not.
        (facts("FAILED", status=9, status_cut=True), "", "out-of-memory", "9 or 137", ""),
        (facts("FAILED", status=9), "", "failed", "failed with exit status 9", "logs 7"),
        (facts("FAILED", status=139), "", "failed", "139, which is signal 11 (SIGSEGV)", ""),
        (facts("FAILED", status=11, status_cut=True), "", "failed", "11 or 139", ""),
        (facts("FAILED", status=3, status_cut=True), "", "failed", "failed with exit status 3", ""),
        (facts("FAILED", status=0, signal=11), "", "failed", "signal 11 (SIGSEGV)", ""),
        (facts("FAILED", status=1), "error", "failed", "exit status 1: KeyError: 'train'", ""),
        (facts("FAILED", status=1), "RuntimeError: HIP error: invalid device\n", "failed", "",
         "device_check -- --nodelist=n1"),
        (facts("FAILED", status=1), "cp: error writing 'x': No space left on device\n", "failed",
         "No space left", "TOOLKIT_SCRATCH"),
        (facts("FAILED", reason="NonZeroExitCode"), "", "failed", "with NonZeroExitCode", ""),
        (facts("NODE_FAIL", failed_node="n3"), "", "node-failure", "n3 failed", "--exclude=n3"),
        (facts("NODE_FAIL", nodes="n[1-2]"), "", "node-failure", "n[1-2]", "--exclude=n[1-2]"),
        (facts("BOOT_FAIL"), "", "never-started", "n1 could not be started", "--exclude=n1"),
        (facts("PREEMPTED"), "", "preempted", "higher priority", "--requeue"),
        (facts("CANCELLED", cancelled_by="1000"), "cancel 22.05", "cancelled",
         "cancelled by ada", ""),
        (facts("CANCELLED", elapsed="00:00:07"), "", "cancelled", "cancelled after 00:00:07", ""),
        (facts("CANCELLED"), "time 20.11", "timeout", "time limit", ""),
        (facts("CANCELLED"), "preemption 24.05", "preempted", "", ""),
        (facts("CANCELLED"), "node 22.05", "node-failure", "n3 failed", "--exclude=n3"),
        (facts("CANCELLED", nodes="", cancelled_by="1000", reason="Priority"), "",
         "never-started", "cancelled by ada in the queue", ""),
        (facts("CANCELLED", nodes="", reason="DependencyNeverSatisfied"), "", "never-started",
         "a job that it depends on", "submit that other job"),
        (facts("FAILED", nodes="", reason="BadConstraints", signal=1), "", "never-started",
         "no node has what it asks for", "sinfo"),
        (facts("FAILED", status=0, signal=53, work_dir="/w", stdout="/logs/x.out"), "",
         "never-started", "/logs/x.out could not be opened", "the folder /logs is there"),
        (facts("RUNNING", started="10:00", restarts=2), "error", "running",
         "runs on n1 since 10:00, put back into the queue twice before", ""),
        (facts("COMPLETING"), "", "running", "is ending on n1", ""),
        (facts("SUSPENDED"), "", "running", "suspended", ""),
        (facts("CONFIGURING"), "", "running", "made ready", ""),
        (facts("STAGE_OUT"), "", "running", "is stage out", ""),
    ],
)  # fmt: skip
def test_verdicts(given, log, kind, text, remedy):
    verdict = judge(given, log)
    assert (verdict.kind, text in verdict.text, remedy in verdict.remedy) == (kind, True, True), (
        verdict
    )
    assert verdict.over is (kind != "running")
    assert "{" not in verdict.text + verdict.remedy


@pytest.mark.parametrize(
    ("own", "state", "kind"),
    [
        ("timeout", "FAILED", "timeout"),  # it took the warning before its limit and ended itself
        ("timeout", "COMPLETED", "timeout"),
        ("cancelled", "FAILED", "cancelled"),
        ("failed", "FAILED", "failed"),
        ("running", "NODE_FAIL", "node-failure"),
        ("running", "TIMEOUT", "timeout"),
        ("completed", "COMPLETED", "completed"),
    ],
)
def test_the_record_knows_better_how_a_job_ended_itself(own, state, kind):
    assert judge(facts(state, status=1), record=Record("7", state=own)).kind == kind


def test_only_the_last_run_counts():
    log = LOGS["memory 22.05"] + LOGS["requeue 22.05"] + "ValueError: no\n"
    assert judge(facts("FAILED", status=1, restarts=1), log).text.endswith("ValueError: no")
    assert judge(facts("FAILED", status=1), log).kind == "out-of-memory"
    # Nothing was written since: the end of the run before is all there is.
    assert judge(facts("CANCELLED", restarts=1), LOGS["node 22.05"]).kind == "node-failure"


@pytest.mark.parametrize(
    ("reason", "kind", "text", "remedy"),
    [
        ("Priority", "waiting", "jobs of higher priority", "shorter time limit"),
        ("Resources", "waiting", "busy", ""),
        ("None", "waiting", "has not looked", ""),
        ("", "waiting", "has not looked", ""),
        ("QOSMaxJobsPerUserLimit", "waiting", "may have running at once", "have ended"),
        ("MaxGRESPerAccount", "waiting", "may have running at once", "have ended"),
        ("AssocGrpCPUMinutesLimit", "stuck", "is used up", "Use another account"),
        ("AssocGrpCPURunMinutesLimit", "waiting", "promised", "shorter time limit"),
        ("QOSGrpSubmitJobsLimit", "waiting", "in the queue at once", ""),
        ("AssocGrpGRES", "waiting", "as much running as it may", ""),
        ("QOSMaxWallDurationPerJobLimit", "stuck", "longer than", "timelimit=T"),
        ("QOSMinGRES", "stuck", "more or less", ""),
        ("PartitionTimeLimit", "stuck", "1-00:00:00 in gpu", "jobid=7 timelimit=1-00:00:00"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-3]", "waiting",
         "(ReqNodeNotAvail, UnavailableNodes:n[1-3])", "shorter time limit"),
        ("ReqNodeNotAvail,_Reserved_for_maintenance", "waiting", "maintenance", "timelimit=T"),
        ("Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved_for_jobs_in_higher_priority_"
         "partitions", "waiting", "Nodes required for job are DOWN", "sinfo -R"),
        ("DependencyNeverSatisfied", "stuck", "did not end as it wants", "scancel 7"),
        ("JobHeldUser", "stuck", "its owner", "scontrol release 7"),
        ("launch failed requeued held", "stuck", "could not be launched", "release 7"),
        ("InvalidQOS", "stuck", "QOS", "--qos"),
        ("SomethingOfALaterSlurm", "waiting", "(SomethingOfALaterSlurm)", ""),
    ],
)  # fmt: skip
def test_reasons(reason, kind, text, remedy):
    verdict = judge(facts("PENDING", reason=reason, estimate="2026-11-21T16:37:02"))
    assert verdict.kind == kind
    assert text in verdict.text
    assert remedy in verdict.remedy
    assert verdict.text.endswith("expects to start it at 2026-11-21T16:37:02")
    assert not verdict.over
    assert "{" not in verdict.text + verdict.remedy


def test_an_unlimited_partition_names_no_limit():
    assert "0:00" not in judge(facts("PENDING", reason="PartitionTimeLimit", partition="free")).text


def test_a_job_that_was_put_back():
    text = judge(facts("PENDING", reason="BeginTime", restarts=1)).text
    assert text.startswith("waits: put back into the queue once; it may not start before")


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([], ""),
        (["", " "], ""),
        (["hello", "bye"], "bye"),
        (["ValueError: a", "  at line 1", "bye"], "ValueError: a"),
        (["x.errors.ToolkitError: a", "loss 0.1 error=0.3"], "x.errors.ToolkitError: a"),
        (["error: no image /x.sif", "  Make it with `make`"], "error: no image /x.sif"),
        (["x.sh: line 3: foo: command not found", LOGS["cancel 22.05"]],
         "x.sh: line 3: foo: command not found"),
        (["KeyError: 1", "srun: error: n1: task 0: Exited with exit code 1"], "KeyError: 1"),
        (["a" * 999], "a" * 300),
    ],
)  # fmt: skip
def test_last_error(lines, error):
    assert status.last_error(lines) == error


def test_what_one_leaves_out_comes_from_the_next():
    shown = Facts("12", number="12", state="FAILED", status=137, nodes="n1", stdout="/w/a.out")
    accounted = Facts(
        "12", number="12", state="FAILED", status=9, status_cut=True, memory_used="1G",
        out_of_memory=True, stdout="%j.out", cancelled_by="", nodes="n9",
    )  # fmt: skip
    both = status.combine([shown, accounted])
    assert (both.status, both.status_cut, both.nodes) == (137, False, "n1")
    assert (both.memory_used, both.out_of_memory, both.stdout) == ("1G", True, "/w/a.out")
    cut = status.combine([accounted], Record("12", exit_code=137, name="train"))
    assert (cut.status, cut.status_cut, cut.name) == (137, False, "train")


def test_a_former_run_says_nothing_of_the_present_one():
    shown = Facts("12", state="RUNNING", nodes="n2", restarts=1)
    former = Facts("12", state="NODE_FAIL", ended="then", status=1, failed_node="n1", limit="1:00")
    both = status.combine([shown, former])
    assert (both.ended, both.status, both.failed_node, both.limit) == ("", None, "", "1:00")


def test_how_long_a_job_without_slurm_took():
    record = Record("local-1", start="2026-11-21T23:59:00+00:00", end="2026-11-23T02:00:30+02:00")
    assert status.from_record(record).elapsed == "1-00:01:30"
    assert status.from_record(Record("local-1", start="2026-11-21T23:59:00+00:00")).elapsed == ""
    assert status.from_record(Record("local-1", start="2026-11-21", end="x")).elapsed == ""


@pytest.mark.parametrize(
    ("start", "submitted", "restarts", "older"),
    [
        ("2026-11-20T10:00:00+00:00", "2026-11-21T10:00:00", 0, True),
        ("2026-11-20T10:00:00+00:00", "2026-11-21T10:00:00", 1, False),
        ("2026-11-23T10:00:00+00:00", "2026-11-21T10:00:00", 0, False),
        ("", "2026-11-21T10:00:00", 0, False),
        ("2026-11-20T10:00:00+00:00", "", 0, False),
    ],
)
def test_a_number_that_was_used_before(start, submitted, restarts, older):
    job = Facts("7", submitted=submitted, restarts=restarts)
    assert status.is_older(Record("7", start=start), job) is older


@pytest.mark.parametrize(
    "text",
    ["12", "12_3", "12+1", "12_[1-5%2]", "12_[1,3-5]", "local-n1-77", "20261121-154500-77"],
)
def test_ids(text):
    assert status.parse_id(text) == text


@pytest.mark.parametrize("text", ["", "abc", "12.", "-3", "12_", "1 2", "12;x", "12.batch", "../x"])
def test_no_ids(text):
    with pytest.raises(UsageError, match="is not a job id"):
        status.parse_id(text)


def test_where_a_log_can_be():
    job = Facts("12_3", number="15", work_dir="/w[1]", stdout="%x_%N-%j.out", name="a", host="n1")
    own = Record("15", log="/r/x.log")
    assert status.log_patterns(job, own) == [
        "/w[[]1]/a_n1-15.out", "/w[[]1]/a_*-15.out", "/r/x.log", "/w[[]1]/slurm-12_3.out",
    ]  # fmt: skip
    only = Facts("12", number="12", work_dir="/w", stdout="%N.out", stderr="/w/e", host="n1")
    assert status.log_patterns(only, None)[0] == "/w/n1.out"
    assert "/w/*.out" not in status.log_patterns(only, None)
    assert status.log_patterns(only, None, error=True) == ["/w/e"]
    same = Facts("12", number="12", work_dir="/w", stdout="%j.out", stderr="%j.out")
    assert status.log_patterns(same, None, error=True)[0] == "/w/12.out"


@pytest.fixture
def call(capsys, monkeypatch):
    """Run the command line in this process: code, stdout, stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["toolkit", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A host without Slurm; return a function that writes a record and its log."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("TOOLKIT_RESULTS", raising=False)
    monkeypatch.chdir(tmp_path)

    def write(job_id, state, log="", **known):
        folder = tmp_path / f"results/mednist-{job_id}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.txt"
        path.write_text(log)
        record = {"job_id": job_id, "name": "mednist", "host": "n1", "state": state,
                  "log": str(path), "exit_code": None, "end": None} | known  # fmt: skip
        (folder / "job.json").write_text(json.dumps(record))
        return folder

    return write


def test_jobs_without_slurm(alone, call):
    folder = alone("local-n1-1", "failed", "one\nValueError: two\n", exit_code=3)
    code, out, err = call("status", "local-n1-1")
    assert (code, err) == (0, "")
    assert "verdict   failed with exit status 3: ValueError: two" in out
    assert f"results   {folder}" in out
    code, out, err = call("status", "local-n1-1", "--json")
    assert json.loads(out)["verdict"] == "failed"
    code, out, err = call("status")
    assert code == 0
    assert re.search(r"^local-n1-1 +mednist +FAILED", out, re.M)
    assert call("logs", "local-n1-1") == (0, "one\nValueError: two\n", "")
    assert call("logs", "local-n1-1", "--lines", "1") == (0, "ValueError: two\n", "")
    code, out, err = call("logs", "local-n1-1", "--follow")
    assert (code, out) == (0, "one\nValueError: two\n")
    assert err.startswith("job local-n1-1 failed with exit status 3")
    assert f"results {folder}" in err


@pytest.mark.parametrize("command", ["status", "logs"])
def test_jobs_that_are_not(alone, call, command):
    code, _, err = call(command, "12")
    assert code == 1
    assert "no job 12: no Slurm here, and no record of it is in" in err
    code, _, err = call(command, "12.batch")
    assert code == 2
    assert "a step of job 12" in err
    assert call(command, "mednist")[0] == 2


def test_no_jobs(alone, call):
    assert call("status") == (0, "no jobs in the queue, none ended since yesterday\n", "")
    assert call("status", "--json") == (0, "[]\n", "")


def test_only_late_jobs_are_listed(alone, call):
    old = alone("local-1", "completed")
    os.utime(old / "job.json", (1, 1))
    alone("local-2", "completed")
    assert [job["job_id"] for job in json.loads(call("status", "--json")[1])] == ["local-2"]
    assert call("status", "local-1")[0] == 0


def test_results_elsewhere(alone, call, tmp_path, monkeypatch):
    folder = alone("local-1", "completed")
    monkeypatch.chdir("/")
    assert call("status", "local-1")[0] == 1
    assert call("status", "local-1", "--results", str(tmp_path / "results"))[0] == 0
    assert call("status", "local-1", "--results", str(folder))[0] == 0
    monkeypatch.setenv("TOOLKIT_RESULTS", str(tmp_path / "results"))
    assert call("status", "local-1")[0] == 0


def test_a_job_that_was_killed_outright(alone, call):
    host = os.uname().nodename
    ended = subprocess.Popen(["/bin/true"])
    ended.wait()
    alone(f"20261121-154500-{ended.pid}", "running", host=host)
    alone(f"20261121-154500-{os.getpid()}", "running", host=host)
    alone("20261121-154500-1", "running", host="elsewhere")
    listed = {job["job_id"]: job["verdict"] for job in json.loads(call("status", "--json")[1])}
    assert listed == {
        f"20261121-154500-{ended.pid}": "unknown",
        f"20261121-154500-{os.getpid()}": "running",
        "20261121-154500-1": "running",
    }


def test_a_broken_record_is_left_out(alone, call):
    folder = alone("local-1", "completed")
    alone("local-2", "completed")
    (folder / "job.json").write_text('{"job_id": "local-1", "sta')
    assert [job["job_id"] for job in json.loads(call("status", "--json")[1])] == ["local-2"]


def test_follow_until_the_record_says_the_end(alone, monkeypatch):
    monkeypatch.setattr(status, "ASK_S", 0.0)
    monkeypatch.setattr(status, "LOOK_S", 0.0)
    monkeypatch.setattr(status, "LATE_S", 0.0)
    folder = alone("local-1", "running", "one\n")
    out = b""

    def write(data):
        nonlocal out
        out += data
        if out == b"one\n":
            alone("local-1", "completed", "one\ntwo\n", exit_code=0)

    job = status.follow("local-1", write=write, say=print)
    assert (out, job.verdict.kind, job.results) == (b"one\ntwo\n", "completed", str(folder))


def test_follow_is_interrupted(alone, tmp_path):
    alone("local-1", "running", "one\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "toolkit", "logs", "local-1", "--follow"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "one\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


def test_whoever_reads_a_log_may_stop(alone):
    alone("local-1", "running", "one\n" * 100000)
    process = subprocess.Popen(
        [sys.executable, "-m", "toolkit", "logs", "local-1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_the_log_tells_where_the_results_are(alone, tmp_path, monkeypatch):
    chosen = alone("12", "timeout", exit_code=85).rename(tmp_path / "mine")
    log = tmp_path / "slurm-12.out"
    log.write_text(f"hello\ntimeout: results in {chosen}\n")
    known = Facts("12", number="12", state="FAILED", status=85, nodes="n1", stdout=str(log))
    job = status.assemble([known], record=None, limits=dict)
    assert (job.verdict.kind, job.results) == ("timeout", str(chosen))
    log.write_text(f"hello\nfailed: results in {tmp_path}/none\n")
    assert status.assemble([known], record=None, limits=dict).results == ""


@pytest.fixture
def programs(alone, tmp_path, monkeypatch):
    """Stand-ins for Slurm's programs; return a function that writes what one prints."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")

    def write(name, text="", trouble=""):
        path = tmp_path / "bin" / name
        (tmp_path / f"bin/{name}.txt").write_text(text)
        end = f"echo '{trouble}' >&2; exit 1" if trouble else f"cat {tmp_path}/bin/{name}.txt"
        path.write_text(f'#!/bin/bash\necho "$*" >>{tmp_path}/bin/{name}.calls\n{end}\n')
        path.chmod(0o755)
        return tmp_path / f"bin/{name}.calls"

    for name in ("squeue", "sinfo"):
        write(name)
    write("sacct", trouble="Slurm accounting storage is disabled")
    write("scontrol", trouble="slurm_load_jobs error: Invalid job id specified")
    return write


def accounted(**known):
    """Return a line of sacct."""
    return slurm.BREAK.join(known.get(field, "") for field in slurm.ACCOUNTING_FIELDS) + "\n"


def test_a_job_that_only_the_accounting_knows(programs, call, tmp_path):
    programs("sacct", accounted(
        JobID="12", JobIDRaw="12", JobName="train", State=f"CANCELLED by {os.getuid()}",
        ExitCode="0:15", Elapsed="00:03:00", NodeList="n1", WorkDir=str(tmp_path),
        StdOut="%x.%j.log",
    ))  # fmt: skip
    (tmp_path / "train.12.log").write_text("one\n")
    code, out, _ = call("status", "12")
    assert code == 0
    assert "cancelled by yourself after 00:03:00" in out
    assert call("logs", "12") == (0, "one\n", "")


def test_slurm_that_does_not_answer_is_no_proof_against_a_job(programs, alone, call):
    for name in ("squeue", "scontrol", "sacct"):
        programs(name, trouble=f"{name}: error: Unable to contact slurm controller")
    code, _, err = call("status", "12")
    assert code == 1
    assert "no job 12: scontrol does not answer: Unable to contact slurm controller" in err
    alone("12", "running")
    code, out, err = call("status", "12")
    assert code == 0
    assert "verdict   runs on n1" in out
    assert "warning: scontrol does not answer" in err
    assert call("status")[0] == 0


def test_the_record_of_another_job_of_that_number(programs, alone, call, tmp_path):
    alone("12", "timeout", "old\n", start="2020-01-01T00:00:00+00:00")
    programs(
        "scontrol",
        "JobId=12 JobName=a\n   JobState=FAILED Reason=None\n   ExitCode=3:0\n"
        f"   SubmitTime=2026-11-21T15:40:49\n   NodeList=n1\n   WorkDir={tmp_path}\n",
    )
    job = json.loads(call("status", "12", "--json")[1])
    assert (job["verdict"], job["results"]) == ("failed", "")


def test_slurm_that_has_forgotten_a_job(programs, alone, call):
    alone("12", "running", "one\n")
    programs("scontrol", trouble="slurm_load_jobs error: Invalid job id specified")
    # It answers: whatever ran is gone.
    (Path(os.environ["PATH"].partition(":")[0]) / "scontrol").write_text(
        '#!/bin/bash\n[ "$1" = ping ] || { echo "Invalid job id specified" >&2; exit 1; }\n'
    )
    assert "ended without a word" in call("status", "12")[1]
    assert call("logs", "12") == (0, "one\n", "")


def test_an_array_is_a_table(programs, call):
    programs("sacct", "".join(
        accounted(JobID=f"12_{n}", JobIDRaw=str(20 + n), JobName="a", State=state, ExitCode="0:0",
                  Elapsed="00:03:00", NodeList="n1")
        for n, state in enumerate(["COMPLETED", "TIMEOUT", "COMPLETED"])
    ))  # fmt: skip
    code, out, _ = call("status", "12")
    assert code == 0
    assert out.splitlines()[-1] == "2 completed, 1 timeout"
    assert "12_1: Submit it again with a longer" in out
    code, out, _ = call("status", "12", "--json")
    assert [task["job_id"] for task in json.loads(out)["tasks"]] == ["12_0", "12_1", "12_2"]
    assert json.loads(call("status", "12_1", "--json")[1])["verdict"] == "timeout"
    code, _, err = call("logs", "12")
    assert code == 2
    assert "array of 3 tasks" in err


def test_follow_asks_slurm_seldom(programs, monkeypatch, tmp_path):
    log = tmp_path / "slurm-12.out"
    log.write_text("one\n")
    asked = programs("scontrol", "JobId=12 JobName=a\n   JobState=RUNNING Reason=None\n"
                     f"   NodeList=n1\n   WorkDir={tmp_path}\n   StdOut={log}\n")  # fmt: skip
    naps: list[float] = []
    clock = [0.0]

    def sleep(seconds):
        naps.append(seconds)
        clock[0] += seconds
        if clock[0] > 60:
            raise KeyboardInterrupt

    monkeypatch.setattr(status, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    with pytest.raises(KeyboardInterrupt):
        status.follow("12", write=lambda _: None, say=print)
    assert min(naps) >= 0.5
    assert len(asked.read_text().splitlines()) <= 60 / 3 + 1


def test_follow_outlives_a_silent_controller(programs, monkeypatch, tmp_path):
    log = tmp_path / "slurm-12.out"
    log.write_text("one\n")
    shown = (f"JobId=12 JobName=a\n   JobState={{}} Reason=None\n   ExitCode=0:0\n   NodeList=n1\n"
             f"   WorkDir={tmp_path}\n   StdOut={log}\n")  # fmt: skip
    programs("scontrol", shown.format("RUNNING"))
    states = iter(["silent", "silent", "COMPLETED"])

    def sleep(_):
        state = next(states, "COMPLETED")
        trouble = "Socket timed out on send/recv operation" if state == "silent" else ""
        programs("scontrol", shown.format(state), trouble=trouble)

    monkeypatch.setattr(status, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    monkeypatch.setattr(status, "ASK_S", 0.0)
    said: list[str] = []
    job = status.follow("12", write=lambda _: None, say=said.append)
    assert job.verdict.kind == "completed"
    assert said == ["scontrol does not answer: Socket timed out on send/recv operation;"
                    " waiting for it"]  # fmt: skip


def test_no_log(programs, tmp_path):
    programs("scontrol", "JobId=12 JobName=a\n   JobState=FAILED Reason=None\n   ExitCode=0:53\n"
             f"   NodeList=n1\n   WorkDir={tmp_path}\n   StdOut=/nonexistent/12.out\n")  # fmt: skip
    with pytest.raises(
        ToolkitError, match=r"has no log /nonexistent/12\.out: never started"
    ) as caught:
        status.follow("12", write=lambda _: None, say=print, going_on=False)
    assert "/nonexistent is there" in caught.value.hint
