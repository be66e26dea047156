"""Reading what Slurm's programs write and what batch scripts ask for."""

import os

import pytest
import slurm_cluster

from toolkit import slurm
from toolkit.errors import ToolkitError, UsageError
from toolkit.sites import Partition

# Recorded from Slurm 22.05.8.
SHOW_JOB = """\
JobId=1 JobName=a b
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901759 Nice=0 Account=(null) QOS=(null)
   JobState=COMPLETED Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=7:0
   RunTime=00:00:00 TimeLimit=00:05:00 TimeMin=N/A
   StartTime=2026-11-21T08:35:25 EndTime=2026-11-21T08:35:25 Deadline=N/A
   NumNodes=1 NumCPUs=1 NumTasks=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   TRES=cpu=1,node=1,billing=1
   Socks/Node=* NtasksPerN:B:S:C=0:0:*:* CoreSpec=*
   OverSubscribe=OK Contiguous=0 Licenses=(null) Network=(null)
   Command=/tmp/a project=1/jobs/j.sh
   WorkDir=/tmp/a project=1
   StdErr=/tmp/a project=1/slurm-1.out
   StdIn=/dev/null
   StdOut=/tmp/a project=1/slurm-1.out
   Power=
   TresPerNode=gres:gpu:1

"""
SINFO = "short*|1:00:00|1-4\nlong|1-00:00:00|1-infinite\nforever|infinite|2\n"


# The right-hand side is what Slurm 22.05.8 made of it.
@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90:30", 91),
        ("0:30", 1),
        ("1:00:30", 61),
        ("1-0", 1440),
        ("1-1:30", 1530),
        ("1-1:30:20", 1531),
        ("00:05:00", 5),
        ("0", None),
        ("-1", None),
        ("unlimited", None),
        ("UNLIMITED", None),
        ("infinite", None),
    ],
)
def test_minutes(text, minutes):
    assert slurm.parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "5x", "1:2:3:4", "1-", "-5", "1.5", "a-1"])
def test_minutes_refused(text):
    with pytest.raises(ValueError, match="is not a time"):
        slurm.parse_minutes(text)


@pytest.mark.parametrize("minutes", [1, 5, 60, 720, 2880, 43200, 1531])
def test_minutes_there_and_back(minutes):
    assert slurm.parse_minutes(slurm.format_minutes(minutes)) == minutes


def test_directives_as_sbatch_reads_them():
    script = """#!/bin/bash
# words

#SBATCH -t 5 --job-name="a b" # comment
##SBATCH --comment=no
 #SBATCH --mem=3
#SBATCH --gres=gpu:1

echo hi
#SBATCH --time=9
"""
    assert slurm.parse_directives(script) == ["-t", "5", "--job-name=a b", "--gres=gpu:1"]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--time=5"], {"time": "5"}),
        (["--time", "5"], {"time": "5"}),
        (["-t5"], {"time": "5"}),
        (["-t", "5"], {"time": "5"}),
        (["--part=short"], {"partition": "short"}),
        (["-Ht5", "-p", "a,b"], {"hold": "", "time": "5", "partition": "a,b"}),
        (["--exclusive", "--nodes=1"], {"exclusive": "", "nodes": "1"}),
        (["--exclusive=user"], {"exclusive": "user"}),
        (["--propagate", "--time=1", "--time=2"], {"propagate": "", "time": "2"}),
        (["--export", "NONE", "--nice"], {"export": "NONE", "nice": ""}),
        (["--ntasks-per=3"], {"ntasks-per": "3"}),
        (["--of-a-later-slurm=1"], {"of-a-later-slurm": "1"}),
        (["--comment="], {"comment": ""}),
    ],
)
def test_options(arguments, options):
    assert slurm.parse_options(arguments) == options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["job.sh"], "'job.sh' is not an option"),
        (["--exclusive", "user"], "'user' is not an option"),
        (["--time"], "--time lacks its value"),
        (["-t"], "-t lacks its value"),
    ],
)
def test_options_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        slurm.parse_options(arguments)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, None),
        ({"gres": "gpu"}, 1),
        ({"gres": "gpu:2"}, 2),
        ({"gres": "gpu:mi300x:4"}, 4),
        ({"gres": "gres:gpu:3"}, 3),
        ({"gres": "gpu:mi300x"}, 1),
        ({"gres": "nvme:1,gpu:2"}, 2),
        ({"gres": "nvme:1"}, None),
        ({"gres": "none"}, None),
        ({"gpus": "8"}, 8),
        ({"gpus": "a100:8"}, 8),
        ({"gpus-per-node": "2"}, 2),
        ({"gpus-per-task": "1", "ntasks": "4"}, 1),
    ],
)
def test_gpu_count(options, count):
    assert slurm.gpu_count(options) == count


def test_submitted():
    assert slurm.parse_submitted("12\n") == slurm.Submitted("12")
    assert slurm.parse_submitted("12;gamma\n") == slurm.Submitted("12", "gamma")
    assert slurm.parse_submitted("Welcome: 40 h left\n\n12\n") == slurm.Submitted("12")
    with pytest.raises(ValueError, match="no job number"):
        slurm.parse_submitted("Job 12 is not a bare number\n")


def test_job():
    facts = slurm.parse_job(SHOW_JOB)
    assert facts["JobId"] == "1"
    assert facts["JobState"] == "COMPLETED"
    assert facts["ExitCode"] == "7:0"
    assert facts["TRES"] == "cpu=1,node=1,billing=1"
    assert facts["TresPerNode"] == "gres:gpu:1"
    assert facts["StdOut"] == "/tmp/a project=1/slurm-1.out"
    assert facts["Command"] == "/tmp/a project=1/jobs/j.sh"
    assert facts["Power"] == ""


def test_partitions():
    assert slurm.parse_partitions(SINFO) == {
        "short": Partition(max_minutes=60, max_nodes=4, default=True),
        "long": Partition(max_minutes=1440),
        "forever": Partition(max_minutes=0, max_nodes=2),
    }
    assert slurm.parse_partitions("") == {}


def test_complaints_are_one_line():
    text = (
        "sbatch: error: invalid partition specified: nope\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n"
    )
    assert slurm.complaint(text) == (
        "invalid partition specified: nope;"
        " Batch job submission failed: Invalid partition name specified"
    )
    assert slurm.complaint("") == "it gave no reason"


def test_a_host_without_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not slurm.available()
    assert slurm.partitions() == {}
    assert slurm.job("1") == {}


@pytest.mark.parametrize(
    ("user", "ci", "outcome"),
    [
        (1000, "", pytest.skip.Exception),
        (1000, "true", pytest.fail.Exception),
        (0, "", pytest.fail.Exception),
    ],
)
def test_tests_without_slurm_are_skipped_only_where_it_could_not_be_installed(
    monkeypatch, user, ci, outcome
):
    monkeypatch.setattr(slurm_cluster, "missing", lambda: ["slurmd"])
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="slurmd missing; install with: apt-get install"):
        slurm_cluster.require()


# Recorded from Slurm 22.05.8, less the lines that nobody reads.
SHOW_ARRAY = """\
JobId=6 ArrayJobId=6 ArrayTaskId=5 ArrayTaskThrottle=2 JobName=job.sh
   JobState=PENDING Reason=JobArrayTaskLimit Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:00 TimeLimit=01:00:00 TimeMin=N/A
   SubmitTime=2026-11-21T15:37:02 EligibleTime=Unknown
   StartTime=Unknown EndTime=Unknown Deadline=N/A
   Partition=short AllocNode:Sid=localhost:8449
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=
   Command=/tmp/st/w a=b/job.sh
   WorkDir=/tmp/st/w a=b
   StdErr=/tmp/st/w a=b/arr-6_5.out
   StdIn=/dev/null
   StdOut=/tmp/st/w a=b/arr-6_5.out
   Power=
   

JobId=19 ArrayJobId=6 ArrayTaskId=4 ArrayTaskThrottle=2 JobName=job.sh
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=1 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:07 TimeLimit=01:00:00 TimeMin=N/A
   SubmitTime=2026-11-21T15:37:02 EligibleTime=2026-11-21T15:37:11
   StartTime=2026-11-21T15:37:11 EndTime=2026-11-21T16:37:11 Deadline=N/A
   Partition=short AllocNode:Sid=localhost:8449
   NodeList=n1
   BatchHost=n1
   Command=/tmp/st/w a=b/job.sh
   WorkDir=/tmp/st/w a=b
   StdErr=/tmp/st/w a=b/arr-6_4.out
   StdIn=/dev/null
   StdOut=/tmp/st/w a=b/arr-6_4.out
   Power=
   

"""  # noqa: W293  # as it came
SHOW_COMPONENTS = """\
JobId=12 HetJobId=12 HetJobOffset=0 JobName=my | odd=name
   HetJobIdSet=12-13
   JobState=PENDING Reason=None Dependency=(null)

JobId=13 HetJobId=12 HetJobOffset=1 JobName=job.sh
   HetJobIdSet=12-13
   JobState=PENDING Reason=None Dependency=(null)
"""
# The order of `slurm.QUEUE_FIELDS`; | stands for the sign between the fields.
SQUEUE = """\
6_[3-5%2]|6|PENDING|JobArrayTaskLimit|0:00|1:00:00|N/A|N/A|2026-11-21T15:37:02||short|/tmp/w|job.sh
11|11|PENDING|BeginTime|0:00|1:00:00|2026-11-21T16:37:02|2026-11-21T17:37:02|2026-11-21T15:37:02|\
|short|/tmp/w a=b|job.sh
12+1|13|PENDING|None|0:00|1:00:00|N/A|N/A|2026-11-21T15:37:03||short|/tmp/w|job.sh
5|5|RUNNING|None|0:02|1:00:00|2026-11-21T15:37:07|2026-11-21T16:37:07|2026-11-21T15:37:02|n1|short\
|/tmp/w|my | odd=name
15|15|CANCELLED|Priority|0:00|1:00|2026-11-21T15:37:07|2026-11-21T15:37:07|2026-11-21T15:37:03||\
short|/tmp/w|job.sh
"""


def test_tasks_of_an_array():
    waits, runs = slurm.parse_jobs(SHOW_ARRAY)
    assert (waits.job_id, waits.number, waits.state) == ("6_5", "6", "PENDING")
    assert (waits.reason, waits.started, waits.estimate, waits.nodes) == (
        "JobArrayTaskLimit", "", "", "",
    )  # fmt: skip
    assert (runs.job_id, runs.number, runs.nodes, runs.restarts) == ("6_4", "19", "n1", 1)
    assert (runs.started, runs.ended, runs.reason) == ("2026-11-21T15:37:11", "", "")
    assert runs.stdout == "/tmp/st/w a=b/arr-6_4.out"


def test_components():
    first, second = slurm.parse_jobs(SHOW_COMPONENTS)
    assert (first.job_id, first.name) == ("12+0", "my | odd=name")
    assert (second.job_id, second.number) == ("12+1", "13")
    assert slurm.parse_jobs("") == slurm.parse_jobs("No jobs in the system\n") == []


def test_queue():
    found = slurm.parse_queue(SQUEUE.replace("|", slurm.BREAK))
    assert [f.job_id for f in found] == ["6_[3-5%2]", "11", "12+1", "5", "15"]
    array, later, component, runs, cancelled = found
    assert array.estimate == ""
    assert (later.estimate, later.started, later.ended) == ("2026-11-21T16:37:02", "", "")
    assert later.work_dir == "/tmp/w a=b"
    assert component.reason == ""
    assert (runs.name, runs.ended) == (f"my {slurm.BREAK} odd=name", "")
    assert cancelled.ended == "2026-11-21T15:37:07"
    assert slurm.parse_queue("a site's greeting\n") == []


FIELDS_BEFORE_23 = tuple(f for f in slurm.ACCOUNTING_FIELDS if f not in slurm.LATER_FIELDS)


def rows(*lines):
    """Make the output of sacct from lines with | between the fields."""
    return "".join(line.replace("|", slurm.BREAK) + "\n" for line in lines)


# Put together by hand, after the sources of these versions of Slurm (src/sacct/print.c,
# src/sacct/options.c) and their manual pages; there is no accounting in the tests' own Slurm.
# 20.11 ends the memory asked for in n or c; FailedNode came with 23.02, StdOut with 24.05,
# Restarts with 24.11.
SACCT_20_11 = rows(
    "7|7|OUT_OF_MEMORY|0:125|None|2020-12-01T10:00:00|2020-12-01T10:00:05|2020-12-01T10:02:00|"
    "00:01:55|01:00:00|n7|gpu|4Gn||/home/me|train",
    "7.batch|7.batch|OUT_OF_MEMORY|0:125||2020-12-01T10:00:05|2020-12-01T10:00:05|"
    "2020-12-01T10:02:00|00:01:55||n7||4Gn|4193032K||batch",
    "7.extern|7.extern|COMPLETED|0:0||2020-12-01T10:00:05|2020-12-01T10:00:05|"
    "2020-12-01T10:02:00|00:01:55||n7||4Gn|912K||extern",
    "8|8|CANCELLED by 1000|0:0|None|2020-12-01T10:00:00|Unknown|2020-12-01T10:02:00|"
    "00:00:00|Partition_Limit|None assigned|gpu|4Gc|||a|b",
)
SACCT_24_11 = rows(
    "9_1|10|NODE_FAIL|1:0|None|2024-12-01T10:00:00|2024-12-01T10:00:05|2024-12-01T10:02:00|"
    "1-00:01:55|2-00:00:00|n[7-8]|gpu|64G||/home/me|n8|%x-%A_%a.out||2|train",
    "9_1.batch|10.batch|CANCELLED|0:15||2024-12-01T10:00:05|2024-12-01T10:00:05|"
    "2024-12-01T10:02:00|1-00:01:55||n7|||1.50G|||||0|batch",
    "9_1.0|10.0|OUT_OF_MEMORY|0:125||2024-12-01T10:00:05|2024-12-01T10:00:05|"
    "2024-12-01T10:02:00|1-00:01:55||n[7-8]|||61.25G|||||0|python3",
    "9_[2-5%2]|9|PENDING|0:0|None|2024-12-01T10:00:00|Unknown|Unknown|"
    "00:00:00|2-00:00:00|None assigned|gpu|64G||/home/me||%x-%A_%a.out||0|train",
)


def test_accounting_of_20_11():
    killed, cancelled = slurm.parse_accounting(SACCT_20_11, FIELDS_BEFORE_23)
    assert (killed.state, killed.status, killed.signal) == ("OUT_OF_MEMORY", 0, 125)
    assert (killed.memory_asked, killed.memory_used) == ("4G", "4193032K")
    assert killed.out_of_memory
    assert killed.status_cut
    assert (cancelled.state, cancelled.cancelled_by) == ("CANCELLED", "1000")
    assert (cancelled.nodes, cancelled.started, cancelled.name) == ("", "", f"a{slurm.BREAK}b")


def test_accounting_of_24_11():
    lost, waits = slurm.parse_accounting(SACCT_24_11)
    assert (lost.job_id, lost.number, lost.state, lost.failed_node) == (
        "9_1", "10", "NODE_FAIL", "n8",
    )  # fmt: skip
    assert (lost.stdout, lost.restarts, lost.memory_used) == ("%x-%A_%a.out", 2, "61.25G")
    assert lost.out_of_memory
    assert (waits.job_id, waits.state, waits.ended, waits.status) == (
        "9_[2-5%2]", "PENDING", "", None,
    )  # fmt: skip


# Recorded from `sacct --completion` of Slurm 22.05.8.
COMPLETED = rows(
    "3|3|FAILED|0:53||2026-11-21T15:40:51|2026-11-21T15:40:51|2026-11-21T15:40:51|00:00:00|60|n1|"
    "short|||/nonexistent|job.sh"
)


def test_file_of_completed_jobs():
    (facts,) = slurm.parse_accounting(COMPLETED, FIELDS_BEFORE_23)
    assert (facts.status, facts.signal, facts.limit) == (0, 53, "01:00:00")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Stand-ins for Slurm's programs; return a function that writes one."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write(name, script):
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\ncd {tmp_path}\necho "$*" >>calls\n{script}\n')
        path.chmod(0o755)
        return tmp_path / "calls"

    return write


# What sacct answers to a field that it does not know, by version, and the calls that follow.
@pytest.mark.parametrize(
    ("unknown", "last", "calls"),
    [("", "Restarts", 1), ("Restarts", "StdErr", 2), ("StdOut", "FailedNode", 2),
     ("FailedNode", "WorkDir", 2)],
)  # fmt: skip
def test_older_accounting_is_asked_for_less(programs, unknown, last, calls):
    log = programs(
        "sacct",
        f'if [[ -n "{unknown}" && $* == *{unknown or "-"}* ]]; then\n'
        f'  echo "sacct: error: Invalid field requested: \\"{unknown}\\"" >&2; exit 1; fi\n'
        "printf '7\\x1f7\\x1fCOMPLETED\\x1f0:0'\n"
        "all=$*; format=${all##*--format=}; format=${format%% *}; commas=${format//[^,]}\n"
        "for ((n = 4; n <= ${#commas}; n++)); do printf '\\x1f'; done; echo name",
    )
    (facts,) = slurm.accounting(job_id="7")
    assert (facts.state, facts.name) == ("COMPLETED", "name")
    lines = log.read_text().splitlines()
    assert len(lines) == calls
    assert f",{last},JobName " in lines[-1]
    assert "--jobs=7" in lines[-1]


def test_no_accounting(programs):
    log = programs("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert slurm.accounting(job_id="7") == []
    assert len(log.read_text().splitlines()) == 2  # the second for the file of completed jobs


def test_no_answer(programs):
    text = "Unable to contact slurm controller (connect failure)"
    for name in ("sacct", "squeue", "scontrol"):
        programs(name, f"echo '{name}: error: {text}' >&2; exit 1")
    for ask in (slurm.queue, lambda: slurm.jobs("7"), lambda: slurm.accounting(job_id="7")):
        with pytest.raises(ToolkitError, match="does not answer: Unable to contact slurm"):
            ask()
    assert not slurm.answers()


@pytest.mark.parametrize(
    "text", ["slurm_load_jobs error: Invalid job id specified", "Job 12_3 not found"]
)
def test_a_job_that_the_controller_does_not_know(programs, text):
    programs("scontrol", f"echo '{text}' >&2; exit 1")
    assert slurm.jobs("12_3") == []


def test_a_host_with_programs_and_no_configuration(programs):
    text = "Could not establish a configuration source"
    for name in ("sacct", "squeue", "scontrol"):
        programs(name, f"echo '{name}: fatal: {text}' >&2; exit 1")
    assert slurm.queue() == slurm.jobs("7") == slurm.accounting(job_id="7") == []
    assert not slurm.answers()


def test_what_users_wish_to_see_does_not_matter(programs, monkeypatch):
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("SACCT_FORMAT", "JobID")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    log = programs("squeue", "env | grep -c 'SQUEUE_\\|SACCT_\\|TIME_FORMAT' >>calls; env >>calls")
    assert slurm.queue() == []
    assert log.read_text().splitlines()[1] == "0"
    assert "SLURM_CONF=/etc/slurm.conf" in log.read_text()


@pytest.mark.parametrize(
    ("job_id", "other", "holds"),
    [
        ("12", "12", True),
        ("12", "12_3", True),
        ("12", "12+1", True),
        ("12", "12_[1-5]", True),
        ("12_3", "12", False),
        ("12_3", "12_4", False),
        ("12", "123", False),
        ("12_[1-5%2]", "12_5", True),
        ("12_[1,3,7-9]", "12_8", True),
        ("12_[1,3,7-9]", "12_5", False),
        ("12_[1-9:4]", "12_5", True),
        ("12_[1-9:4]", "12_6", False),
        ("12+0", "12+1", False),
        ("local-1", "local-1", True),
        ("local-1", "12", False),
    ],
)
def test_what_a_job_id_covers(job_id, other, holds):
    assert slurm.covers(job_id, other) is holds


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("slurm-%j.out", "slurm-15.out"),
        ("%x.%A_%a.log", "a[*]b.12_3.log"),
        ("%4A-%12j-%3a", "0012-0000000015-003"),
        ("%N/%u/%n", "n1/me/0"),
        ("100%%-%j", "100%-15"),
        ("%q %", "%q %"),
        (r"a\%j", "a%j"),
        ("[x]?", "[[]x][?]"),
    ],
)
def test_log_names(pattern, path):
    facts = slurm.Facts("12_3", number="15", name="a*b", host="n1.example.org")
    assert slurm.expand(pattern, facts, user="me") == path


def test_what_is_not_known_of_a_log_name():
    assert slurm.expand("%x-%N-%j-%a", slurm.Facts("7")) == "*-*-7-4294967294"


@pytest.mark.parametrize(
    ("text", "count"), [("1180K", 1208320), ("4G", 2**32), ("12", 12), ("", 0), ("?", 0)]
)
def test_bytes(text, count):
    assert slurm.parse_bytes(text) == count
