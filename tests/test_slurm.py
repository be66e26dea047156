"""Reading what Slurm's programs write and what batch scripts ask for."""

import os

import pytest
import slurm_cluster

from toolkit import slurm
from toolkit.errors import UsageError
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
SINFO = "short*|1:00:00\nlong|1-00:00:00\nforever|infinite\n"


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
        (["--export", "--time=1", "--time=2"], {"export": "", "time": "2"}),
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
        "short": Partition(max_minutes=60, default=True),
        "long": Partition(max_minutes=1440),
        "forever": Partition(max_minutes=0),
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
