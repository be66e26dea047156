"""The jobs on a real Slurm, with real containers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster

from toolkit import apptainer, paths, processes

pytestmark = [pytest.mark.slurm, pytest.mark.image]

ROOT = Path(__file__).resolve().parents[1]
_SEARCHED = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
MARK = "run_in_container python3 -m monai.config.deviceconfig"


@pytest.fixture(scope="session")
def small_sif(tmp_path_factory):
    """An image with a shell and a few programs of this host, made in a second."""
    folder = tmp_path_factory.mktemp("small")
    root = folder / "root"
    for name in ("bin", "dev", "etc", "home", "proc", "root", "sys", "tmp", "var/tmp"):
        (root / name).mkdir(parents=True)
    programs = [Path("/bin") / name for name in ("bash", "cat", "env", "ls", "mkdir", "sleep")]
    libraries = processes.run(["ldd", *programs]).stdout
    for source in [*programs, *map(Path, set(re.findall(r"\s(/\S+) \(0x", libraries)))]:
        target = root / str(source).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    (root / "bin/sh").symlink_to("bash")
    output: list[str] = []
    done = apptainer.build(
        apptainer.find(), root, folder / "small.sif",
        arguments={}, binds=(), tmpdir=folder, line=output.append,
    )  # fmt: skip
    assert done.code == 0, "\n".join(output)
    return folder / "small.sif"


@pytest.fixture
def project(tmp_path, small_sif):
    """A project whose image is the small one, with a job that runs $PROGRAM in it."""
    home = tmp_path / "project"
    shutil.copytree(paths.jobs(), home / "jobs")
    (home / "jobs/own").mkdir()
    text = (home / "jobs/monai_check/job.sh").read_text()
    assert MARK in text
    (home / "jobs/own/job.sh").write_text(text.replace(MARK, 'run_in_container bash -c "$PROGRAM"'))
    (home / "build").mkdir()
    (home / "build/monai.sif").symlink_to(small_sif)
    return home


@pytest.fixture
def told(slurm):
    """What a job of these tests must be told: where Apptainer is, if it is at no usual place."""
    return {"TOOLKIT_APPTAINER": str(apptainer.find().path)}


def bare(slurm, home):
    """The environment of a user who has Slurm and Apptainer and nothing of the toolkit."""
    path = f"{apptainer.find().path.parent}:/usr/bin:/bin"
    return {"PATH": path, "SLURM_CONF": slurm.environment["SLURM_CONF"], "HOME": str(home)}


def sbatch(slurm, project, program, *options, **environment):
    """Submit the job that runs a program; return its number."""
    done = slurm.run(
        "sbatch", "--parsable", *options, project / "jobs/own/job.sh",
        environment={"PROGRAM": program, **environment}, cwd=project,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    return done.stdout.strip()


def submit(slurm, folder, *arguments, **environment):
    return slurm.run(
        sys.executable, "-m", "toolkit", "submit", *arguments,
        environment={"PYTHONPATH": _SEARCHED, **environment}, cwd=folder,
    )  # fmt: skip


def queued(slurm):
    return slurm.run("squeue", "--noheader", "--format=%i").stdout.split()


def wait_for(holds, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return answer


def log_of(facts):
    return Path(facts["StdOut"]).read_text()


# The two checks on the real image


@pytest.mark.parametrize(
    ("job", "lines"),
    [
        ("pytorch_check", [r"^Version: \d+\.\d+", r"^Devices: \d+$"]),
        ("monai_check", [r"^MONAI version: \d+\.\d+", r"^Pytorch version: \d+"]),
    ],
)
@pytest.mark.parametrize("how", ["sbatch", "submit", "bash"])
def test_checks(slurm, monai_sif, tmp_path, job, lines, how):
    script = ROOT / "jobs" / job / "job.sh"
    home = tmp_path / "home"
    home.mkdir()
    if how == "bash":
        done = processes.run(
            ["bash", script],
            environment=bare(slurm, home) | {"IMAGE": str(monai_sif)},
            cwd=tmp_path,
        )
        assert done.code == 0, done.stderr
        text = done.stdout
    else:
        if how == "sbatch":
            done = processes.run(
                ["sbatch", "--parsable", "--gres=gpu:1", f"--chdir={tmp_path}", script],
                environment=bare(slurm, home) | {"IMAGE": str(monai_sif)},
                cwd=ROOT,
            )
        else:
            done = submit(
                slurm, tmp_path, job, "--site", "local", "--image", str(monai_sif),
                HOME=str(home), TOOLKIT_APPTAINER=str(apptainer.find().path),
            )  # fmt: skip
        assert done.code == 0, done.stderr
        number = re.search(r"\d+", done.stdout)
        assert number
        facts = slurm.finish(number[0])
        text = log_of(facts)
        assert facts["ExitCode"] == "0:0", text
        assert facts["TresPerNode"] == "gres:gpu:1"
        assert Path(facts["StdOut"]).parent == tmp_path
        if how == "submit":
            assert done.stdout == f"job {number[0]}\nlog {facts['StdOut']}\n"
    for line in lines:
        assert re.search(line, text, re.M), text
    assert not list(home.iterdir())


# What any job can rely on


def test_a_gpu_is_granted_and_seen_by_the_container(slurm, project, told):
    program = "echo gpus=$SLURM_GPUS_ON_NODE home=$HOME poison=$POISON; ls /toolkit/jobs"
    facts = slurm.finish(sbatch(slurm, project, program, POISON="yes", **told))
    text = log_of(facts)
    assert facts["JobState"] == "COMPLETED", text
    assert "gpus=1 home=/home/job poison=\n" in text
    assert "common.sh" in text


def test_exit_status_is_that_of_the_container(slurm, project, told):
    facts = slurm.finish(sbatch(slurm, project, "exit 7", **told))
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "7:0")
    done = submit(
        slurm, project, "own", "--site", "local", "--", "--wait",
        PROGRAM="exit 7", TOOLKIT_HOME=str(project), **told,
    )  # fmt: skip
    assert done.code == 1
    assert re.search(r"job \d+ ended with exit status 7\n  log /.*\.out", done.stderr)


def test_a_job_without_an_image_fails_and_says_so(slurm, project, told):
    (project / "build/monai.sif").unlink()
    facts = slurm.finish(sbatch(slurm, project, "true", **told))
    assert facts["ExitCode"] == "2:0"
    assert "make build-monai-sif" in log_of(facts)


def test_submitted_from_elsewhere_the_project_is_found(slurm, project, told, tmp_path):
    # Only Slurm knows then where the script was.
    done = slurm.run(
        "sbatch", "--parsable", project / "jobs/own/job.sh",
        environment={"PROGRAM": "echo here", **told}, cwd=tmp_path,
    )  # fmt: skip
    facts = slurm.finish(done.stdout.strip())
    assert f"project {project}\n" in log_of(facts)
    assert "\nhere\n" in log_of(facts)


def test_cancelled_jobs_leave_nothing(slurm, project, told, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    before = set(processes.descendants(slurm.pid))
    number = sbatch(
        slurm, project, "(trap '' TERM; sleep 1000) & echo up; sleep 1000 & wait",
        TOOLKIT_SCRATCH=str(scratch), **told,
    )  # fmt: skip
    log = project / f"slurm-{number}.out"
    wait_for(lambda: log.exists() and "\nup\n" in log.read_text())
    assert list(scratch.iterdir())
    assert set(processes.descendants(slurm.pid)) - before
    slurm.run("scancel", number)
    assert slurm.finish(number)["JobState"] == "CANCELLED"
    wait_for(lambda: not set(processes.descendants(slurm.pid)) - before)
    assert not list(scratch.iterdir())


def test_a_cancelled_program_still_has_its_image_while_it_saves(slurm, project, told):
    """Slurm asks every process of the job to end, also those that mount the image."""
    # Not in any cache: what it runs then has not run before.
    program = "trap 'sleep 1; cat /proc/version; ls /toolkit; echo saved; exit 5' TERM"
    number = sbatch(slurm, project, f"{program}; echo up; sleep 1000 & wait", **told)
    log = project / f"slurm-{number}.out"
    wait_for(lambda: log.exists() and "\nup\n" in log.read_text())
    slurm.run("scancel", number)
    facts = slurm.finish(number)
    wait_for(lambda: slurm.show(number)["ExitCode"] == "5:0")
    text = log_of(facts)
    assert "Linux version" in text
    assert "\njobs\nsaved\n" in text


def test_a_signal_to_the_batch_shell_reaches_the_program(slurm, project, told):
    """As with ``--signal=B:TERM@120``, some time before the limit."""
    program = "trap 'echo saved; exit 5' TERM; echo up; sleep 1000 & wait"
    number = sbatch(slurm, project, program, **told)
    log = project / f"slurm-{number}.out"
    wait_for(lambda: log.exists() and "\nup\n" in log.read_text())
    slurm.run("scancel", "--batch", "--signal=TERM", number)
    facts = slurm.finish(number)
    assert facts["ExitCode"] == "5:0"
    assert "saved" in log_of(facts)


# toolkit submit


def test_dry_run_and_test_only_queue_nothing(slurm, project, told):
    before = queued(slurm)
    common = ("own", "--site", "local", "--gpus", "2")
    environment = {"TOOLKIT_HOME": str(project), "PROGRAM": "true", **told}
    done = submit(slurm, project, *common, "--dry-run", **environment)
    assert done.code == 0, done.stderr
    assert "--gres=gpu:2" in done.stdout
    done = submit(slurm, project, *common, "--test-only", **environment)
    assert done.code == 0, done.stderr
    assert re.search(
        r"to start at \S+ using 1 processors on nodes n1 in partition short", done.stdout
    )
    done = submit(slurm, project, *common[:-1], "3", "--test-only", **environment)
    assert done.code == 1
    assert "Requested node configuration is not available" in done.stderr
    assert queued(slurm) == before


def test_the_printed_command_works_as_it_is(slurm, project, told):
    environment = {"TOOLKIT_HOME": str(project), "PROGRAM": "echo pasted", **told}
    done = submit(slurm, project, "own", "--site", "local", "--dry-run", **environment)
    line = done.stdout.splitlines()[0]
    done = slurm.run("bash", "-c", line, environment={"PROGRAM": "echo pasted"})
    facts = slurm.finish(done.stdout.strip())
    assert facts["WorkDir"] == str(project)
    assert "\npasted\n" in log_of(facts)


def test_submit_in_json(slurm, project, told):
    done = submit(
        slurm, project, "own", "--site", "local", "--json", "--", "--output=%x-%j.log",
        PROGRAM="true", TOOLKIT_HOME=str(project), **told,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert answer["log"] == f"{project}/monai_check-{answer['job_id']}.log"
    assert slurm.finish(answer["job_id"])["JobState"] == "COMPLETED"


def test_ones_own_script_with_its_arguments(slurm, project, told):
    (project / "mine").mkdir()
    (project / "mine/run.sh").write_text('cat /input/x; echo "$@" >made; ls /code; exit 3')
    (project / "x").write_text("the input\n")
    done = submit(
        slurm, project, "train", "--site", "local", "--json", "--", "--time=5", "mine/run.sh",
        "--lr", "a b", INPUT="x", TOOLKIT_HOME=str(project), **told,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    answer = json.loads(done.stdout)
    facts = slurm.finish(answer["job_id"])
    text = Path(answer["log"]).read_text()
    assert (facts["ExitCode"], facts["Requeue"]) == ("3:0", "1"), text
    assert "the input\n" in text
    assert "\nrun.sh\n" in text
    results = project / f"results/train-{answer['job_id']}"
    assert (results / "made").read_text() == "--lr a b\n"
    assert json.loads((results / "job.json").read_text())["exit_code"] == 3


@pytest.mark.parametrize("export", ["--export=NONE", "--export=SEED", "--export=SEED=7,X=1"])
def test_a_job_without_the_environment_is_told_all_the_same(slurm, project, told, tmp_path, export):
    """What it is told has a comma in it, which divides names in --export."""
    (tmp_path / "image.sif").symlink_to((project / "build/monai.sif").resolve())
    (project / "build/monai.sif").unlink()
    (tmp_path / "t.sh").write_text('echo "seed ${SEED:-none} extra ${EXTRA:-none}"; ls -d /mnt/*\n')
    environment = {
        **told, "TOOLKIT_HOME": str(project), "SEED": "3", "EXTRA": "4",
        "TOOLKIT_PASS": "SEED EXTRA", "TOOLKIT_BINDS": f"{tmp_path}:/mnt/a,{project}:/mnt/b",
    }  # fmt: skip
    done = submit(
        slurm, tmp_path, "train", "--site", "local", "--image", "image.sif", "--device", "cpu",
        "--", export, "t.sh", **environment,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    facts = slurm.finish(done.stdout.split()[1])
    text = log_of(facts)
    assert facts["ExitCode"] == "0:0", text
    seed = {"--export=NONE": "none", "--export=SEED": "3"}.get(export, "7")
    assert f"seed {seed} extra none\n" in text
    assert f"{tmp_path}/image.sif, device cpu, project {project}\n" in text


def test_runs_in_one_interactive_allocation(slurm, project, told, tmp_path):
    run = f"bash {project}/jobs/own/job.sh"
    done = slurm.run(
        "salloc", "--job-name=interactive", "bash", "-c", f"{run}; {run}; srun {run}",
        environment=told | {"PROGRAM": "echo mine >/results/x"}, cwd=tmp_path,
    )  # fmt: skip
    found = list((tmp_path / "results").glob("[!.]*"))
    assert len(found) == 3, done.stderr
    assert {json.loads((path / "job.json").read_text())["state"] for path in found} == {"completed"}
    assert all(re.fullmatch(r"own-\d+-\d{8}-\d{6}-\d+", path.name) for path in found)


def test_a_build_in_a_job(slurm, tmp_path, told):
    """Of an image that there is not, which is soon told, by the project's own toolkit."""
    done = submit(
        slurm, tmp_path, "build", "--site", "local", "--json", "--", "--time=5", "monia",
        **told,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    answer = json.loads(done.stdout)
    facts = slurm.finish(answer["job_id"])
    assert facts["ExitCode"] == "2:0", Path(answer["log"]).read_text()
    assert "monai" in Path(answer["log"]).read_text()


@pytest.mark.parametrize(
    ("gpu_option", "expected"),
    [
        # Alone, --gpus-per-node would come on top of what the script asks for.
        ("--gpus-per-node={count}", {"TresPerNode": "gres:gpu:2"}),
        ("--gpus={count}", {"TresPerJob": "gres:gpu:2"}),
        ("--ntasks={count} --gpus-per-task=1", {"TresPerTask": "gres:gpu:1", "NumTasks": "2"}),
    ],
)
def test_gpus_in_a_sites_own_way(slurm, project, told, gpu_option, expected):
    site = project / "jobs/sites/other.toml"
    site.write_text(f'description = "x"\ngpu_option = "{gpu_option}"\n')
    done = submit(
        slurm, project, "own", "--site", "other", "--gpus", "2", "--json", "--", "--hold",
        PROGRAM="true", TOOLKIT_HOME=str(project), **told,
    )  # fmt: skip
    number = json.loads(done.stdout)["job_id"]
    facts = slurm.show(number)
    slurm.run("scancel", number)
    assert {name: facts.get(name) for name in expected} == expected
    assert len([name for name in facts if name.startswith("TresPer")]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # Slurm itself would take this one and never start it.
        (["--time=5:00:00"], "the limit of partition short"),
        (["--partition=shrot"], "did you mean short"),
    ],
)
def test_what_slurm_would_never_run_is_refused(slurm, project, told, options, message):
    before = queued(slurm)
    done = submit(
        slurm, project, "own", "--site", "local", "--", *options, TOOLKIT_HOME=str(project), **told
    )
    assert done.code == 2
    assert message in done.stderr
    assert queued(slurm) == before


# The cluster itself


def test_a_cluster_leaves_nothing_behind(project, told):
    with slurm_cluster.cluster() as second:
        number = sbatch(second, project, "sleep 1000", **told)
        second.wait_for(number, "RUNNING")
        log = project / f"slurm-{number}.out"
        wait_for(lambda: log.exists() and "project" in log.read_text())
        below = processes.descendants(second.pid)
        assert len(below) > 4
    assert not [pid for pid in below if _is_alive(pid)]
    assert not second.folder.exists()


def test_a_cluster_ends_with_the_session_that_is_killed(project, told):
    session = subprocess.Popen(
        [sys.executable, slurm_cluster.__file__, "--", "sleep", "1000"],
        env=os.environ | {"PYTHONPATH": _SEARCHED},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert session.stderr is not None
    folder = Path(json.loads(session.stderr.readline())["SLURM_CONF"]).parent
    below = processes.descendants(session.pid)
    assert len(below) > 4
    os.killpg(session.pid, signal.SIGKILL)
    session.communicate()
    wait_for(lambda: not [pid for pid in below if _is_alive(pid)])
    assert not folder.exists()


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
