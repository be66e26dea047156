"""``toolkit status`` and ``toolkit logs`` on records, and on stand-ins for Slurm's programs."""

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

from toolkit import cli, slurm, watch
from toolkit.errors import ToolkitError
from toolkit.slurm import Facts

ROOT = Path(__file__).resolve().parents[1]


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
    monkeypatch.setattr(watch, "ASK_S", 0.0)
    monkeypatch.setattr(watch, "LOOK_S", 0.0)
    monkeypatch.setattr(watch, "LATE_S", 0.0)
    folder = alone("local-1", "running", "one\n")
    out = b""

    def write(data):
        nonlocal out
        out += data
        if out == b"one\n":
            alone("local-1", "completed", "one\ntwo\n", exit_code=0)

    job = watch.follow("local-1", write=write, say=print)
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
    job = watch.assemble([known], record=None, limits=dict)
    assert (job.verdict.kind, job.results) == ("timeout", str(chosen))
    log.write_text(f"hello\nfailed: results in {tmp_path}/none\n")
    assert watch.assemble([known], record=None, limits=dict).results == ""


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


def test_the_list_tells_of_a_failed_job_what_is_told_of_it_alone(programs, call, tmp_path):
    """Where there is no accounting: squeue knows neither exit status nor log."""
    (tmp_path / "my.log").write_text("ValueError: two\n")
    known = {"job_id": "12", "number": "12", "state": "FAILED", "reason": "NonZeroExitCode",
             "nodes": "n1", "work_dir": str(tmp_path), "name": "a"}  # fmt: skip
    programs("squeue", slurm.BREAK.join(known.get(name, "") for name in slurm.QUEUE_FIELDS) + "\n")
    asked = programs(
        "scontrol",
        "JobId=12 JobName=a\n   JobState=FAILED Reason=NonZeroExitCode\n   ExitCode=2:0\n"
        f"   NodeList=n1\n   WorkDir={tmp_path}\n   StdOut={tmp_path}/my.log\n",
    )
    (listed,) = json.loads(call("status", "--json")[1])
    assert listed["summary"] == "failed with exit status 2: ValueError: two"
    assert asked.read_text().splitlines() == ["show job 12"]
    alone = json.loads(call("status", "12", "--json")[1])
    assert alone == listed
    # What the accounting knows need not be asked for.
    programs("sacct", accounted(
        JobID="12", JobIDRaw="12", JobName="a", State="FAILED", ExitCode="2:0", NodeList="n1",
        WorkDir=str(tmp_path),
    ))  # fmt: skip
    asked.unlink()
    assert "failed with exit status 2" in call("status")[1]
    assert not asked.exists()


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

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    with pytest.raises(KeyboardInterrupt):
        watch.follow("12", write=lambda _: None, say=print)
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

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    monkeypatch.setattr(watch, "ASK_S", 0.0)
    said: list[str] = []
    job = watch.follow("12", write=lambda _: None, say=said.append)
    assert job.verdict.kind == "completed"
    assert said == ["scontrol does not answer: Socket timed out on send/recv operation;"
                    " waiting for it"]  # fmt: skip


def test_follow_ends_when_slurm_has_forgotten_the_job(programs, monkeypatch, tmp_path):
    (tmp_path / "slurm-12.out").write_text("one\n")
    programs("scontrol", "JobId=12 JobName=a\n   JobState=RUNNING Reason=None\n   NodeList=n1\n"
             f"   WorkDir={tmp_path}\n")  # fmt: skip
    text = '[ "$1" = ping ] || { echo "Invalid job id specified" >&2; exit 1; }'

    def sleep(_):
        (tmp_path / "bin/scontrol").write_text(f"#!/bin/bash\n{text}\n")
        programs("sbatch")

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    monkeypatch.setattr(watch, "ASK_S", 0.0)
    out: list[bytes] = []
    job = watch.follow("12", write=out.append, say=print)
    assert (job.verdict.kind, out) == ("unknown", [b"one\n"])


def test_follow_says_why_a_job_waits_once(programs, monkeypatch, tmp_path):
    shown = ("JobId=12 JobName=a\n   JobState={} Reason={}\n   StartTime={} ExitCode=0:0\n"
             f"   NodeList=n1\n   WorkDir={tmp_path}\n")  # fmt: skip
    programs("scontrol", shown.format("PENDING", "Priority", "2026-11-21T15:40:49"))
    steps = iter([("PENDING", "Priority", "2026-11-21T15:41:49"), ("PENDING", "Resources", "N/A"),
                  ("PENDING", "Resources", "2026-11-21T15:41:49")])  # fmt: skip

    def sleep(_):
        (tmp_path / "slurm-12.out").touch()
        programs("scontrol", shown.format(*next(steps, ("COMPLETED", "None", "N/A"))))

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    monkeypatch.setattr(watch, "ASK_S", 0.0)
    said: list[str] = []
    assert watch.follow("12", write=print, say=said.append).verdict.kind == "completed"
    assert re.findall(r"\((\w+)\)", "".join(said)) == ["Priority", "Resources"]


def test_no_log(programs, tmp_path):
    programs("scontrol", "JobId=12 JobName=a\n   JobState=FAILED Reason=None\n   ExitCode=0:53\n"
             f"   NodeList=n1\n   WorkDir={tmp_path}\n   StdOut=/nonexistent/12.out\n")  # fmt: skip
    with pytest.raises(
        ToolkitError, match=r"has no log /nonexistent/12\.out: never started"
    ) as caught:
        watch.follow("12", write=lambda _: None, say=print, going_on=False)
    assert "/nonexistent is there" in caught.value.hint
