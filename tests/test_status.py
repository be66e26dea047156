"""The verdict on a job, from what Slurm, its record and its log say."""

import re
from pathlib import Path

import pytest

from toolkit import status
from toolkit.errors import UsageError
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
         "No space left", "TOOLKIT_SCRATCH and TOOLKIT_RESULTS."),
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
         "in the queue, where it waited because a job that it depends on",
         "Repair and submit that other job, then this one."),
        (facts("CANCELLED", nodes="", cancelled_by="1000", reason="JobHeldUser"), "",
         "never-started", "never started: cancelled by ada in the queue, where it waited because"
         " its owner holds it back (JobHeldUser)", "Submit it again if wanted."),
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


@pytest.mark.parametrize("state", ["CANCELLED", "FAILED"])
def test_a_job_that_is_gone_is_told_nothing_that_takes_its_number(state):
    for pattern, *_ in status.REASONS:
        reason = re.sub(r"\|.*|\W", "", pattern)
        verdict = judge(facts(state, nodes="", reason=reason, signal=1))
        assert verdict.kind == "never-started"
        assert not re.search("scontrol|scancel", verdict.remedy), (reason, verdict.remedy)
        assert re.match("[A-Z]", verdict.remedy), (reason, verdict.remedy)
    held = judge(facts(state, nodes="", reason="PartitionTimeLimit", signal=1))
    assert held.remedy == "Submit it again with a shorter time limit, or use another partition."


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
