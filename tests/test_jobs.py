"""The bundled jobs: how they are planned for a site, what is refused, what their scripts do."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from toolkit import jobs, paths, sites, slurm
from toolkit.errors import UsageError
from toolkit.sites import Partition, Site

pytestmark = pytest.mark.slow

#: Instead of Apptainer: notes how it was called, then runs the program without a container.
APPTAINER = """\
#!/bin/bash
[ "$1" = --version ] && { echo "apptainer version 1.4.5"; exit; }
{ printf '%s\\n' "$@"; echo ---; env; } > "$(dirname "$0")/called"
while [[ $1 != *.sif ]]; do shift; done
shift
exec "$@"
"""

#: A job of the tests, made from a bundled one: only its last line is another.
MARK = "run_in_container python3 -m monai.config.deviceconfig"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with the bundled jobs and one that runs $PROGRAM, and a stand-in for Apptainer."""
    for name in [name for name in os.environ if re.match(r"SLURM_|SBATCH_|TOOLKIT_|IMAGE$", name)]:
        monkeypatch.delenv(name)
    home = tmp_path / "project"
    shutil.copytree(paths.jobs(), home / "jobs")
    own = home / "jobs/own/job.sh"
    own.parent.mkdir()
    text = (home / "jobs/monai_check/job.sh").read_text()
    assert MARK in text
    own.write_text(text.replace(MARK, 'run_in_container bash -c "$PROGRAM"'))
    (home / "build").mkdir()
    (home / "build/monai.sif").touch()
    (home / ".tools/bin").mkdir(parents=True)
    (home / ".tools/bin/apptainer").write_text(APPTAINER)
    (home / ".tools/bin/apptainer").chmod(0o755)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return home


def script(project, name="own", *arguments, **environment):
    return subprocess.run(
        ["bash", project / "jobs" / name / "job.sh", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def called(project):
    """Return the arguments and the environment that the stand-in was called with."""
    arguments, _, environment = (project / ".tools/bin/called").read_text().partition("---\n")
    pairs = (line.partition("=") for line in environment.splitlines())
    return arguments.splitlines(), {name: value for name, _, value in pairs}


def toolkit(*arguments, **environment):
    searched = [str(Path(jobs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "toolkit", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(searched)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


# What there is


def test_every_job_can_be_listed_and_says_what_it_does():
    assert {"build", "device_check", "distributed", "jupyter", "monai_check", "pytorch_check",
            "train"} <= set(jobs.names())  # fmt: skip
    for name in jobs.names():
        job = jobs.load(name)
        assert job.options["job-name"] == name
        assert re.match(r"(Print|Check|Run|Build|Train) .*\.$", job.summary)
        assert re.search(rf"sbatch .*jobs/{name}/job\.sh", job.about)
        assert "#" not in job.about


def test_unknown_job_names_the_nearest():
    with pytest.raises(UsageError) as caught:
        jobs.load("pytorch_chek")
    assert "pytorch_check" in caught.value.hint


def test_header_ends_before_the_options_and_the_code():
    text = "#!/bin/bash\n# One.\n#\n#   two\n#SBATCH --time=1\n# three\n"
    assert jobs.parse_header(text) == "One.\n\n  two"
    assert jobs.parse_header("#!/bin/bash\n# One.\n\n# two\n") == "One."
    assert jobs.parse_header("#!/bin/bash\nset -u\n") == ""


def test_scripts_are_clean():
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert shellcheck, "shellcheck is missing"
    files = [paths.jobs() / "common.sh", *paths.jobs().glob("*/*.sh")]
    done = subprocess.run([shellcheck, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_script_finds_the_project_in_the_same_way():
    # This part cannot be shared: it is what finds what is shared.
    parts = {
        (folder / "job.sh").read_text().partition("\nset -u\n")[2].partition('common.sh"\n')[0]
        for folder in (paths.jobs() / name for name in jobs.names())
    }
    assert len(parts) == 1
    assert "find_project" in parts.pop()


# What is planned


def planned(site, *extra, gpus=None, job="pytorch_check", environment=None, image="/i.sif"):
    return jobs.plan(
        jobs.load(job),
        site=sites.load(site) if isinstance(site, str) else site,
        site_name="there",
        image=Path(image),
        gpus=gpus,
        extra=extra,
        environment=environment or {},
    )


def options_of(submission):
    """Return its arguments but for those that are always there."""
    return [
        a
        for a in submission.arguments[:-1]
        if a not in ("--parsable", "--export=ALL") and not a.startswith("--chdir=")
    ]


@pytest.mark.parametrize(
    ("site", "gpus", "expected"),
    [
        ("local", None, ["--gres=gpu:1"]),
        ("local", 2, ["--gres=gpu:2"]),
        ("local", 0, ["--gres=none"]),
        ("jade", 8, ["--partition=short", "--gres=gpu:8"]),
        ("lumi", None, ["--partition=small-g", "--gres=none", "--gpus-per-node=1"]),
        ("archer2", 2, ["--partition=gpu", "--qos=gpu-shd", "--gres=none", "--gpus=2"]),
        (
            "frontier",
            2,
            ["--partition=batch", "--constraint=nvme", "--gres=none", "--ntasks=2",
             "--gpus-per-task=1", "--gpu-bind=closest"],
        ),
    ],
)  # fmt: skip
def test_each_site_is_asked_in_its_own_way(site, gpus, expected):
    assert options_of(planned(site, gpus=gpus)) == expected


def test_what_the_caller_says_wins():
    plan = planned("jade", "-p", "long", "--gres=gpu:3")
    assert options_of(plan) == ["-p", "long", "--gres=gpu:3"]
    assert options_of(planned("jade", "--gpus=3")) == [
        "--partition=short",
        "--gres=none",
        "--gpus=3",
    ]
    assert "--qos=gpu-shd" not in planned("archer2", "--qos=gpu-exc").arguments
    assert options_of(planned("jade", environment={"SBATCH_PARTITION": "long"})) == ["--gres=gpu:1"]
    assert planned("jade", "--chdir=/x").arguments.count("--chdir=/x") == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), "ALL"),
        (("--export=NONE",), "TOLD"),
        (("--export", "none"), "TOLD"),
        (("--export=SEED,LR=1e-3",), "SEED,LR=1e-3,TOLD"),
        (
            ("--export=IMAGE=/other.sif",),
            "IMAGE=/other.sif,TOOLKIT_SCRATCH,TOOLKIT_HOME,TOOLKIT_SITE",
        ),
        (("--export=all,LR=1e-3",), "all,LR=1e-3"),
    ],
)
def test_the_job_gets_what_it_is_told_whatever_else_it_gets(given, expected):
    """Slurm hands on by --export only what is named there."""
    plan = planned("local", *given)
    told = "TOOLKIT_SCRATCH,TOOLKIT_HOME,TOOLKIT_SITE,IMAGE"
    assert ",".join(plan.environment) == told
    assert plan.options[-1] == f"--export={expected.replace('TOLD', told)}"
    site = Site(description="x", options=("--export=NONE",))
    if not given:
        assert planned(site).options[-1] == f"--export={told}"


@pytest.mark.parametrize("given", ["--export=NIL", "--export-file=names"])
def test_what_would_keep_from_the_job_what_it_is_told_is_refused(given):
    with pytest.raises(UsageError, match=given.partition("=")[0]):
        planned("local", given)


@pytest.mark.parametrize(
    ("job", "words", "message", "hint"),
    [
        (
            "mednist",
            ["--preset", "fast"],
            "--preset is not",
            "one of the job's own: give it before",
        ),
        ("train", ["--epochs=3", "a.py"], "--epochs is not", "second --, as in `-- -- --epochs`"),
        ("pytorch_check", ["--partitoin=x"], "--partitoin is not", "partition"),
        ("train", ["-Z", "a.py"], "-Z is not", "second --"),
    ],
)
def test_what_is_no_option_of_sbatch_is_refused(job, words, message, hint, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    slurm._plugin_help.cache_clear()
    with pytest.raises(UsageError, match=message) as caught:
        planned("local", *words, job=job)
    assert hint in caught.value.hint


def test_options_that_plugins_add_to_sbatch_are_taken(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho '      --container-image=PATH   pyxis'\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    slurm._plugin_help.cache_clear()
    assert "--container-image=x" in planned("local", "--container-image=x").options
    with pytest.raises(UsageError, match="--container-imag is not"):
        planned("local", "--container-imag=x")
    slurm._plugin_help.cache_clear()


def test_every_option_of_sbatch_passes():
    for name in slurm.VALUED | slurm.FLAGS:
        if name not in ("test-only", "export-file", "gres"):
            assert f"--{name}=1" in planned("local", f"--{name}=1").options


def test_gpus_asked_for_twice():
    with pytest.raises(UsageError, match="twice"):
        planned("jade", "--gres=gpu:3", gpus=2)


def test_the_script_comes_last_and_test_only_is_no_option_of_the_job():
    plan = planned("local", "--hold")
    assert plan.own == ()
    assert plan.arguments[-1] == str(jobs.load("pytorch_check").script)
    with pytest.raises(UsageError, match="--test-only"):
        planned("local", "--test-only")


@pytest.mark.parametrize(
    ("words", "options", "own"),
    [
        ([], [], []),
        (["-t", "5", "-N2", "a.py", "--lr", "-t"], ["-t", "5", "-N2"], ["a.py", "--lr", "-t"]),
        (["--time=5", "--", "--odd"], ["--time=5"], ["--odd"]),
        (["--exclusive", "a.py"], ["--exclusive"], ["a.py"]),
        (["a.py", "--", "x"], [], ["a.py", "--", "x"]),
    ],
)
def test_options_of_sbatch_and_the_jobs_own_arguments(words, options, own):
    assert jobs.split_arguments(words) == (options, own)
    plan = planned("local", *words, job="train")
    assert plan.own == tuple(own)
    assert plan.options[-len(options) - 1 :] == (*options, "--export=ALL")
    assert plan.arguments == (*plan.options, str(jobs.load("train").script), *own)


def test_a_job_without_arguments_is_given_none():
    with pytest.raises(UsageError, match=r"'a\.py' is not an option") as caught:
        planned("local", "--time=5", "a.py")
    assert "pytorch_check takes no arguments" in caught.value.message
    with pytest.raises(UsageError, match="lacks its value"):
        planned("local", "--time", job="train")


def test_the_job_is_told_what_the_site_file_says():
    site = Site(
        description="x", device="rocm", scratch="/s/$SLURM_JOB_ID", binds=("/a", "/b:/c:ro"),
        modules=("apptainer/1.3", "x"), environment={"NCCL_SOCKET_IFNAME": "hsn0,hsn1"},
    )  # fmt: skip
    told = planned(site).environment
    assert told == {
        "TOOLKIT_HOME": str(paths.home()),
        "TOOLKIT_SITE": "there",
        "IMAGE": "/i.sif",
        "TOOLKIT_DEVICE": "rocm",
        "TOOLKIT_SCRATCH": "/s/$SLURM_JOB_ID",
        "TOOLKIT_BINDS": "/a,/b:/c:ro",
        "TOOLKIT_MODULES": "apptainer/1.3 x",
        "TOOLKIT_PASS": "NCCL_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME": "hsn0,hsn1",
    }
    mine = {"NCCL_SOCKET_IFNAME": "hsn0", "TOOLKIT_DEVICE": "cpu", "TOOLKIT_PASS": "SEED,A, B"}
    told = planned(site, environment=mine).environment
    assert told["NCCL_SOCKET_IFNAME"] == "hsn0"
    assert told["TOOLKIT_DEVICE"] == "cpu"
    assert told["TOOLKIT_PASS"] == "NCCL_SOCKET_IFNAME SEED A B"


def test_the_printed_command_is_the_command():
    plan = planned("jade", "--comment=two words")
    words = shlex.split(plan.command)
    assert words[0] == "env"
    assert tuple(words[words.index("sbatch") + 1 :]) == plan.arguments
    assert f"TOOLKIT_HOME={paths.home()}" in words


# What is refused


def refusal(site, *extra, partitions=None, environment=None):
    found = sites.load(site) if isinstance(site, str) else site
    job = jobs.load("pytorch_check")
    with pytest.raises(UsageError) as caught:
        jobs.refuse(
            planned(found, *extra, environment=environment),
            job=job,
            site=found,
            site_name="there",
            partitions=found.partitions if partitions is None else partitions,
            environment=environment or {},
        )
    return caught.value


def test_time_above_the_limit_is_refused():
    error = refusal("jade", "--time=13:00:00")
    assert "12:00:00, the limit of partition short" in error.message
    assert "medium, long" in error.hint
    assert "no partition there" in refusal("jade", "-t31-0").hint
    assert "limit of partition medium" in refusal("jade", "--partition=medium", "-t3-0").message
    assert refusal("jade", "--time=UNLIMITED")
    assert refusal("jade", environment={"SBATCH_TIMELIMIT": "13:00:00"})


@pytest.mark.parametrize(
    ("site", "gpus", "extra", "limit"),
    [
        ("jade", 9, (), 8),
        ("jade", None, ("--gres=gpu:mi300x:9", "-N2"), 16),
        ("archer2", 9, ("-A", "x", "-N", "1-2"), 8),
        ("frontier", 9, ("-A", "x"), 8),
    ],
)
def test_more_gpus_than_there_are_are_refused(site, gpus, extra, limit):
    found = sites.load(site)
    with pytest.raises(UsageError, match=f"more than .* has on .*: {limit}$"):
        jobs.refuse(
            planned(found, *extra, gpus=gpus), job=jobs.load("pytorch_check"), site=found,
            site_name=site, partitions=found.partitions, environment={},
        )  # fmt: skip


def test_other_refusals():
    error = refusal("jade", "--partition=shrot")
    assert "no partition 'shrot'" in error.message
    assert "short" in error.hint
    assert "without an account" in refusal("lumi").message
    assert "--cpus-per-task" in refusal("archer2", "-c", "4", "-A", "me").message
    assert "'soon' is not a time" in refusal("jade", "--time=soon").message
    assert "--ntasks: 'x' is not a number" in refusal(
        "frontier", "-A", "me", "--gpus-per-task=1", "-n", "x"
    ).message  # fmt: skip
    error = refusal("lumi", "-A", "me", "-N", "5-6")
    assert "--nodes=5-6 is more than 4, the limit of partition small-g at" in error.message
    assert "standard-g, dev-g" in error.hint
    assert "no partition there" in refusal("lumi", "-A", "me", "-N", "1025").hint
    # Small jobs must be short there.
    error = refusal("frontier", "-A", "me", "--time=3:00:00")
    assert "2:00:00, the limit of partition batch at there for 1 node" in error.message
    assert error.hint.endswith("allows it: extended.")
    error = refusal("frontier", "-A", "me", "--time=13:00:00", "-N184")
    assert "12:00:00, the limit of partition batch at there for 184 nodes" in error.message
    assert "no partition there" in error.hint
    assert refusal("frontier", "-A", "me", "-p", "extended", "-N65")
    # Slurm's own partitions count where the site's file names none.
    assert "limit of partition debug" in refusal(
        "local", "--time=11", partitions={"debug": Partition(max_minutes=10, default=True)}
    ).message  # fmt: skip


@pytest.mark.parametrize(
    ("site", "extra", "environment"),
    [
        ("local", (), {}),
        ("local", ("--time=99-0", "--partition=any"), {}),
        ("jade", ("--time=12:00:00",), {}),
        ("jade", ("-p", "short,long", "-t", "30-0"), {}),
        ("lumi", ("--account=project_1",), {}),
        ("lumi", (), {"SBATCH_ACCOUNT": "project_1"}),
        ("frontier", ("-A", "x", "--time=2:00:00", "-N91"), {}),
        ("frontier", ("-A", "x", "--time=6:00:00", "-N92"), {}),
        ("frontier", ("-A", "x", "--time=12:00:00", "-N184"), {}),
        ("frontier", ("-A", "x", "--time=1-0", "-p", "batch,extended"), {}),
        ("lumi", ("-A", "x", "-N2-5"), {}),
        ("lumi", ("-A", "x", "-N5", "-p", "small-g,standard-g", "-t2-0"), {}),
        ("jade", ("--gres=gpu:8", "-N2"), {}),
        ("archer2", ("-A", "x", "--gpus=8", "-N2"), {}),
        ("frontier", ("-A", "x", "-n16", "--gpus-per-task=1", "-N2"), {}),
    ],
)
def test_what_is_not_refused(site, extra, environment):
    found = sites.load(site)
    jobs.refuse(
        planned(found, *extra, environment=environment),
        job=jobs.load("pytorch_check"),
        site=found,
        site_name=site,
        partitions=found.partitions,
        environment=environment,
    )


def test_image(project, monkeypatch):
    local = sites.load("local")
    monkeypatch.setenv("TOOLKIT_HOME", str(project))
    assert jobs.find_image(option=None, site=local) == project / "build/monai.sif"
    other = project / "other.sif"
    other.touch()
    monkeypatch.setenv("TOOLKIT_IMAGE", str(other))
    assert jobs.find_image(option=None, site=local) == other
    monkeypatch.setenv("IMAGE", str(project / "build/monai.sif"))
    assert jobs.find_image(option=None, site=local) == project / "build/monai.sif"
    assert jobs.find_image(option=other, site=local) == other
    with pytest.raises(UsageError, match="no image") as caught:
        jobs.find_image(option=project / "none.sif", site=local)
    assert "make build-monai-sif" in caught.value.hint


def test_a_job_that_can_do_without_an_image(project, monkeypatch):
    local, job = sites.load("local"), jobs.load("device_check")
    monkeypatch.setenv("TOOLKIT_HOME", str(project))
    assert jobs.find_image(option=None, site=local, job=job) == project / "build/monai.sif"
    (project / "build/monai.sif").unlink()
    assert jobs.find_image(option=None, site=local, job=job) is None
    plan = jobs.plan(job, site=local, site_name="local", image=None, environment={})
    assert "IMAGE" not in plan.environment
    for other, option in ((job, project / "none.sif"), (jobs.load("monai_check"), None)):
        with pytest.raises(UsageError, match="no image"):
            jobs.find_image(option=option, site=local, job=other)


# The command line


def test_dry_run_prints_what_would_run_and_needs_no_slurm(project):
    done = toolkit(
        "submit", "pytorch_check", "--site", "jade", "--dry-run", TOOLKIT_HOME=str(project)
    )
    assert done.returncode == 0, done.stderr
    sbatch, container = (shlex.split(line) for line in done.stdout.splitlines())
    assert sbatch[-1] == f"{project}/jobs/pytorch_check/job.sh"
    assert "--partition=short" in sbatch
    assert container[-2:] == ["python3", "/toolkit/jobs/pytorch_check/pytorch_check.py"]
    assert container[-3] == f"{project}/build/monai.sif"
    assert "--rocm" in container
    assert not list((project.parent / "scratch").iterdir())
    assert not (project.parent / "results").exists()
    done = toolkit(
        "submit", "pytorch_check", "--site", "jade", "--dry-run", "--json",
        TOOLKIT_HOME=str(project),
    )  # fmt: skip
    assert json.loads(done.stdout)["container"] == container
    assert json.loads(done.stdout)["sbatch"] == sbatch[sbatch.index("sbatch") :]


def test_the_dry_run_is_what_then_runs(project):
    environment = {"TOOLKIT_HOME": str(project), "PROGRAM": "true", "TOOLKIT_PASS": "PROGRAM"}
    done = toolkit("submit", "own", "--site", "local", "--dry-run", "--json", **environment)
    promised = json.loads(done.stdout)
    assert script(project, **(environment | promised["environment"])).returncode == 0
    arguments, variables = called(project)
    place = re.compile(r"toolkit-\w+\.\w+")
    container = [place.sub("WORK", word) for word in promised["container"]]
    assert container[container.index("--quiet") :] == [place.sub("WORK", a) for a in arguments]
    for word in container[1 : container.index("--quiet") - 1]:
        name, _, value = word.partition("=")
        assert place.sub("WORK", variables[name]) == value


def test_the_dry_run_of_ones_own_script(project, tmp_path):
    (tmp_path / "own code").mkdir()
    (tmp_path / "own code/train.py").touch()
    arguments = ("own code/train.py", "--lr", "1e-3")
    done = toolkit(
        "submit", "train", "--site", "local", "--dry-run", "--json", "--", "-t5", *arguments,
        TOOLKIT_HOME=str(project),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["sbatch"][-4:] == [f"{project}/jobs/train/job.sh", *arguments]
    assert "-t5" in answer["sbatch"][:-4]
    assert answer["container"][-4:] == ["python3", "/code/train.py", "--lr", "1e-3"]
    assert f"{tmp_path}/own code:/code:ro" in answer["container"]
    assert answer["container"][answer["container"].index("--pwd") + 1] == "/results"
    done = toolkit("submit", "train", "--site", "local", "--dry-run", "--", "no/train.py",
                   TOOLKIT_HOME=str(project))  # fmt: skip
    assert done.returncode != 0
    assert "no script no/train.py" in done.stderr


@pytest.mark.parametrize("option", ["--chdir=", "-D"])
def test_the_dry_run_is_where_the_job_will_start(project, tmp_path, option):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/a.py").touch()
    (tmp_path / "here.py").touch()

    def dry_run(folder, name):
        return toolkit(
            "submit", "train", "--site", "local", "--dry-run", "--", option + folder, name,
            TOOLKIT_HOME=str(project),
        )  # fmt: skip

    for folder in ("there", f"{tmp_path}/there"):
        done = dry_run(folder, "a.py")
        assert f"{tmp_path}/there:/code:ro" in done.stdout, done.stderr
    done = dry_run("there", "here.py")
    assert done.returncode == 2
    assert f"no script here.py in {tmp_path}/there" in done.stderr
    done = dry_run("nowhere", "a.py")
    assert done.returncode == 2
    assert f"no folder {tmp_path}/nowhere" in done.stderr


def test_the_dry_run_of_a_build(project):
    (project / "build/monai.sif").unlink()
    done = toolkit("submit", "build", "--site", "jade", "--dry-run", "--", "monai", "--force",
                   TOOLKIT_HOME=str(project))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("-m toolkit build monai --force\n")


def test_submit_without_slurm_says_what_to_do(project):
    (project.parent / "bin").mkdir()
    done = toolkit(
        "submit", "own", "--site", "local", TOOLKIT_HOME=str(project), PATH=f"{project.parent}/bin"
    )
    assert done.returncode == 1
    assert "no sbatch" in done.stderr
    assert f"bash {project}/jobs/own/job.sh" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "pytorch_chek"], "pytorch_check"),
        (["submit", "pytorch_check", "--site", "jad"], "jade"),
        (["submit", "pytorch_check", "--site", "local", "--image", "no.sif"], "make build-monai"),
        (["submit", "own", "--site", "local", "--dry-run", "--test-only"], "exclude"),
        (["submit", "own", "--site", "jade", "--dry-run", "--", "-t", "2-0"], "12:00:00"),
        (["submit", "own", "--site", "local", "--dry-run", "--", "x.sh"], "x.sh"),
        (["jobs", "show", "monai"], "monai_check"),
    ],
)
def test_wrong_calls(project, arguments, message):
    done = toolkit(*arguments, TOOLKIT_HOME=str(project))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 3
    assert not done.stdout


def test_list_and_show():
    done = toolkit("jobs", "list")
    assert done.returncode == 0
    assert re.search(r"^pytorch_check +1 +00:05:00 +Print", done.stdout, re.M)
    listed = {job["name"] for job in json.loads(toolkit("jobs", "list", "--json").stdout)}
    assert listed == set(jobs.names())
    done = toolkit("jobs", "show", "monai_check")
    assert "bash jobs/monai_check/job.sh" in done.stdout
    assert "--gres=gpu:1" in done.stdout
    assert "TOOLKIT_SCRATCH" in done.stdout
    shown = json.loads(toolkit("jobs", "show", "monai_check", "--json").stdout)
    assert shown["options"]["nodes"]
    assert not shown["takes_arguments"]
    shown = json.loads(toolkit("jobs", "show", "train", "--json").stdout)
    assert shown["takes_arguments"]
    assert shown["variables"]["CODE"].startswith("folder to be /code")
    assert shown["variables"]["INPUT"] == (
        "files and folders, by commas, that are copied to the node's scratch first;"
        " in the container they are /input/NAME"
    )


# What the scripts do


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_exit_status_is_the_programs(project, status):
    assert script(project, PROGRAM=f"exit {status}").returncode == status


def test_a_check_takes_no_arguments(project):
    done = script(project, "pytorch_check", "--epochs=3")
    assert done.returncode == 2
    assert "--epochs=3" in done.stderr


@pytest.mark.parametrize(
    "words",
    [["--results", "out"], ["--results=out"], ["--resul", "out"], ["--cache=c"], ["--data", "d"],
     ["--epochs", "1", "--resume"]],
)  # fmt: skip
def test_mednist_sets_its_folders_itself(project, tmp_path, words):
    """What was written to another folder would be lost, without a word."""
    environment = {"TOOLKIT_DRY_RUN": "1", "MEDNIST_DATA": str(tmp_path)}
    for done in (
        script(project, "mednist", *words, **environment),
        script(project, "mednist", MEDNIST_OPTIONS=" ".join(words), **environment),
    ):
        assert done.returncode == 2
        assert re.match(
            r"error: --(results|resul|cache|data|resume) is set by the job\n", done.stderr
        )
        assert "in RESULTS" in done.stderr
    done = script(project, "mednist", "--epochs", "1", "--decay=1", **environment)
    assert done.stdout.endswith("--resume --epochs 1 --decay=1 \n"), done.stderr


def test_the_options_of_mednist_are_known():
    program = (paths.jobs() / "mednist/train.py").read_text()
    options = set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', program))
    assert len(options) > 10
    shown = json.loads(toolkit("jobs", "show", "mednist", "--json").stdout)["arguments"]
    assert shown.keys() == options - {"--data", "--results", "--cache", "--resume"}
    assert (shown["--preset"], shown["--augment"]) == ("seed|fast", "")


def test_options_of_mednist_are_taken_before_those_of_sbatch(project, tmp_path):
    done = toolkit(
        "submit", "mednist", "--site", "local", "--preset", "fast", "--dry-run", "--json",
        "--epochs=2", "--", "-t5", TOOLKIT_HOME=str(project), MEDNIST_DATA=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["sbatch"][-3:] == ["--preset", "fast", "--epochs=2"]
    assert answer["container"][-3:] == ["--preset", "fast", "--epochs=2"]


def binds_of(done):
    words = shlex.split(done.stdout)
    return [words[n + 1] for n, word in enumerate(words) if word == "--bind"]


@pytest.mark.parametrize("below", ["", "mednist/"])
def test_mednist_gets_what_links_in_the_folder_of_data_lead_to(project, tmp_path, below):
    """Bound is what they lead to: in the container they would lead to nothing."""
    shared, mine = tmp_path / "shared", tmp_path / "mine"
    (shared / "x/MedNIST/Hand").mkdir(parents=True)
    (shared / "MedNIST.manifest.json").touch()
    (mine / below).mkdir(parents=True)
    folder, archive = mine / below / "MedNIST", mine / below / "MedNIST.tar.gz"
    folder.symlink_to(shared / "x/MedNIST")
    archive.symlink_to(shared / "archive.tgz")

    def dry_run(place):
        return script(project, "mednist", TOOLKIT_DRY_RUN="1", MEDNIST_DATA=str(place))

    # The link to the archive leads to nothing as yet.
    for place in (mine, folder, folder.resolve()):
        done = dry_run(place)
        assert f"{shared}/x/MedNIST:/data/MedNIST:ro" in binds_of(done), done.stderr
        assert " --data /data/MedNIST " in done.stdout
    (shared / "archive.tgz").touch()
    for place, name in ((mine, archive.name), (archive, archive.name),
                        (shared / "archive.tgz", "archive.tgz")):  # fmt: skip
        done = dry_run(place)
        assert f"{shared}/archive.tgz:/data/{name}:ro" in binds_of(done), done.stderr
        # Beside what the link leads to, where there is none beside the link.
        manifest = "MedNIST.manifest.json"
        assert f"{shared}/{manifest}:/data/{manifest}:ro" in binds_of(done)
    (mine / below / manifest).touch()
    assert f"{mine / below}/{manifest}:/data/{manifest}:ro" in binds_of(dry_run(mine))
    assert f"MEDNIST_FOLDER={mine / below}" in shlex.split(dry_run(mine).stdout)


def test_mednist_names_the_data_that_cannot_be(project, tmp_path):
    (tmp_path / "a,b/MedNIST").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead/MedNIST").symlink_to("/nowhere")
    for name, message in (
        ("a,b", f"{tmp_path}/a,b/MedNIST: Apptainer binds no names with : or ,"),
        ("empty", f"no data at {tmp_path}/empty on"),
        ("none", f"no data at {tmp_path}/none on"),
        ("dead", f"{tmp_path}/dead/MedNIST leads to nothing on"),
    ):
        done = script(project, "mednist", MEDNIST_DATA=name)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {message}"), done.stderr
        assert len(done.stderr.splitlines()) <= 2
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("by", ["arguments", "MEDNIST_OPTIONS"])
def test_the_device_of_mednist_is_the_containers_too(project, tmp_path, by):
    words = ["--seed", "3", "--device", "rocm"]
    environment = {"TOOLKIT_DRY_RUN": "1", "MEDNIST_DATA": str(tmp_path)}
    if by == "MEDNIST_OPTIONS":
        environment[by], words = " ".join(words), []
    done = script(project, "mednist", *words, **environment)
    assert " --rocm " in done.stdout, done.stderr
    assert done.stdout.endswith("--device rocm --resume --seed 3 \n")


@pytest.mark.parametrize("code", ["256", "False", "None", "0"])
def test_a_process_that_ends_with_nothing_wrong_is_no_failure(tmp_path, code):
    """As one of torchrun's; a failure would be noted in /failures, which is not here."""
    (tmp_path / "a.py").write_text(f"import sys\nsys.exit({code})\n")
    done = subprocess.run(
        [sys.executable, paths.jobs() / "distributed/launch.py", tmp_path / "a.py"],
        env=os.environ
        | {"TORCHELASTIC_RUN_ID": "1", "RANK": "1", "LOCAL_RANK": "1", "NODE": "n1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("failures", "own"),
    [
        # It ended without a word, and torchrun ended the others.
        ({1: (7, 0), 0: (-15, 0), 2: (-15, 0)}, [1]),
        # One of the others did not end when it was asked to.
        ({1: (1, 0), 0: (-15, 0), 2: (-9, 30)}, [1]),
        # Found dead at once.
        ({0: (1, 0), 1: (-9, 0), 2: (-15, 1)}, [0, 1]),
        # Somebody else has ended the first.
        ({1: (-15, 0), 0: (-15, 0)}, [1]),
        ({0: (-15, 0)}, [0]),
    ],
)
def test_processes_that_torchrun_ended_did_not_fail_first(failures, own):
    known = runpy.run_path(str(paths.jobs() / "distributed/launch.py"))
    told = {
        rank: SimpleNamespace(exitcode=code, timestamp=1_800_000_000 + second)
        for rank, (code, second) in failures.items()
    }
    assert [rank for rank, _ in known["own_failures"](told)] == own


def test_the_container_gets_no_home_and_only_what_is_passed(project):
    done = script(
        project,
        PROGRAM="pwd",
        HOME=str(project / "home"),
        SLURM_JOB_ID="41",
        SLURM_NTASKS="1",
        SLURM_SUBMIT_DIR=str(project),
        SLURM_CONF="/x",
        OMP_NUM_THREADS="3",
        PYTHONPATH="/poison",
        SEED="a,b c",
        TOOLKIT_PASS="SEED UNSET",
    )
    assert done.returncode == 0, done.stderr
    arguments, variables = called(project)
    assert arguments[:3] == ["--quiet", "exec", "--cleanenv"]
    work = next(a for a in arguments if a.endswith(":/home/job")).partition("/home:")[0]
    assert re.fullmatch(f"{project.parent}/scratch/toolkit-41\\.\\w+", work)
    assert f"{work}/tmp:/tmp" in arguments
    assert f"{project}/jobs:/toolkit/jobs:ro" in arguments
    passed = {k: v for k, v in variables.items() if k.startswith("APPTAINERENV_")}
    assert passed == {
        "APPTAINERENV_SLURM_JOB_ID": "41",
        "APPTAINERENV_SLURM_NTASKS": "1",
        "APPTAINERENV_SLURM_SUBMIT_DIR": str(project),
        "APPTAINERENV_OMP_NUM_THREADS": "3",
        "APPTAINERENV_SEED": "a,b c",
    }
    assert variables["APPTAINER_CONFIGDIR"] == f"{work}/apptainer"
    # Apptainer would bind the folder that it is started in.
    assert done.stdout.strip() == work
    assert not (project / "home").exists()
    assert not list((project.parent / "scratch").iterdir())


@pytest.mark.parametrize(
    ("device", "given", "passed"),
    [
        ("rocm", ["ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"], ["ROCR_VISIBLE_DEVICES"]),
        ("rocm", ["HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"], ["HIP_VISIBLE_DEVICES"]),
        ("rocm", ["CUDA_VISIBLE_DEVICES"], ["CUDA_VISIBLE_DEVICES"]),
        ("cuda", ["CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"], ["CUDA_VISIBLE_DEVICES"]),
        ("hpu", ["HABANA_VISIBLE_MODULES", "CUDA_VISIBLE_DEVICES"], ["HABANA_VISIBLE_MODULES"]),
    ],
)
def test_devices_are_masked_once(project, device, given, passed):
    environment = dict.fromkeys(given, "1") | {"TOOLKIT_DEVICE": device}
    assert script(project, PROGRAM="true", **environment).returncode == 0
    arguments, variables = called(project)
    assert [n for n in variables if n.endswith(("DEVICES", "MODULES")) and "ENV_" in n] == [
        f"APPTAINERENV_{name}" for name in passed
    ]
    assert ("--rocm" in arguments) == (device == "rocm")
    assert ("--nv" in arguments) == (device == "cuda")


def test_device_that_is_not_there_is_told(project):
    if Path("/dev/kfd").exists():
        pytest.skip("this host has an AMD GPU")
    done = script(project, PROGRAM="true", TOOLKIT_DEVICE="rocm")
    assert done.returncode == 0
    assert "no device files for rocm" in done.stderr
    done = script(project, PROGRAM="true", TOOLKIT_DEVICE="gpu")
    assert done.returncode == 2
    assert "must be rocm, cuda, hpu or cpu" in done.stderr


@pytest.mark.parametrize(
    ("files", "device"),
    [
        ({}, "cpu"),
        ({"dev/kfd": ""}, "rocm"),
        ({"dev/nvidiactl": ""}, "cuda"),
        ({"dev/hl0": ""}, "hpu"),
        ({"sys/class/accel/accel0/device/vendor": "0x1da3\n"}, "hpu"),
        # Intel's NPUs use the same class.
        ({"sys/class/accel/accel0/device/vendor": "0x8086\n", "dev/accel/accel0": ""}, "cpu"),
    ],
)
def test_devices_are_found_by_their_files(tmp_path, files, device):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["bash", "-c", '. "$1"; detect_device "$2"', "bash", paths.jobs() / "common.sh", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == device


def test_binds_that_the_node_lacks_are_left_out(project):
    done = script(project, PROGRAM="true", TOOLKIT_BINDS=f"/usr:/mnt:ro,{project}/none")
    assert done.returncode == 0
    assert f"{project}/none is not on" in done.stderr
    arguments, _ = called(project)
    assert "/usr:/mnt:ro" in arguments
    assert not [a for a in arguments if a.endswith("/none")]


def test_scratch(project):
    root = project.parent / "fast"
    wanted = f"{root}/slurm-$SLURM_JOB_ID"
    done = script(project, PROGRAM="pwd", TOOLKIT_SCRATCH=wanted, SLURM_JOB_ID="41")
    assert done.stdout.startswith(f"{root}/slurm-41/toolkit-41.")
    assert not root.exists()  # what the job made is gone
    done = script(project, PROGRAM="true", TOOLKIT_SCRATCH="$NOT_SET_HERE/x")
    assert done.returncode == 2
    assert "$NOT_SET_HERE/x cannot be expanded" in done.stderr
    done = script(project, PROGRAM="true", TOOLKIT_SCRATCH="/dev/null/x")
    assert done.returncode == 2
    assert "cannot make the scratch folder /dev/null/x" in done.stderr


def test_singularity_is_spoken_to_in_its_own_words(project, tmp_path):
    other = tmp_path / "singularity"
    other.write_text(APPTAINER.replace("apptainer version 1.4.5", "singularity-ce version 4.1.3"))
    other.chmod(0o755)
    done = script(project, PROGRAM="true", TOOLKIT_APPTAINER=str(other), OMP_NUM_THREADS="3")
    assert done.returncode == 0
    variables = (tmp_path / "called").read_text()
    assert "\nSINGULARITYENV_OMP_NUM_THREADS=3\n" in variables
    assert "\nAPPTAINER" not in variables


def test_what_is_missing_is_told(project):
    (project / "build/monai.sif").unlink()
    done = script(project, PROGRAM="true")
    assert done.returncode == 2
    assert f"no image {project}/build/monai.sif" in done.stderr
    assert "make build-monai-sif" in done.stderr
    done = script(project, PROGRAM="true", TOOLKIT_APPTAINER="/nope")
    assert done.returncode == 2
    assert "/nope is not a program" in done.stderr
    (project / ".tools/bin/apptainer").unlink()
    if not shutil.which("apptainer") and not shutil.which("singularity"):
        done = script(project, PROGRAM="true")
        assert done.returncode == 2
        assert "no apptainer or singularity" in done.stderr


def test_modules_that_cannot_be_loaded_end_the_job(project):
    done = script(project, PROGRAM="true", TOOLKIT_MODULES="apptainer/0.0")
    assert done.returncode == 2
    assert "apptainer/0.0" in done.stderr


def test_the_project_is_found(project, tmp_path):
    """As sbatch runs it: a copy of the script in a folder of its own."""
    copy = tmp_path / "spool/slurm_script"
    copy.parent.mkdir()
    shutil.copy(project / "jobs/own/job.sh", copy)

    def run(script=copy, **environment):
        return subprocess.run(
            ["bash", script],
            env=os.environ | {"PROGRAM": "true"} | environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    assert f"project {project}\n" in run(TOOLKIT_HOME=str(project)).stderr
    assert f"project {project}\n" in run(SLURM_SUBMIT_DIR=str(project)).stderr
    assert f"project {project}\n" in run(SLURM_SUBMIT_DIR=str(project / "jobs/own")).stderr
    # A stand-in for Slurm that knows the job.
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(
        f'#!/bin/sh\necho "JobId=$3"\necho "   Command={project}/jobs/own/job.sh"\n'
    )
    scontrol.chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = run(SLURM_SUBMIT_DIR="/usr", SLURM_JOB_ID="4", PATH=path)
    assert f"project {project}\n" in done.stderr
    # The script, or its folder, by a link elsewhere.
    (tmp_path / "else").mkdir()
    (tmp_path / "else/own").symlink_to(project / "jobs/own")
    (tmp_path / "else/own.sh").symlink_to(project / "jobs/own/job.sh")
    for name in ("own/job.sh", "own.sh"):
        scontrol.write_text(f'#!/bin/sh\necho "   Command={tmp_path}/else/{name} a b/c.sh"\n')
        done = run(SLURM_SUBMIT_DIR="/usr", SLURM_JOB_ID="4", PATH=path)
        assert f"project {project}\n" in done.stderr
        done = run(script=tmp_path / "else" / name)
        assert f"project {project}\n" in done.stderr
        assert f"results in {tmp_path}/results/own-" in done.stderr
    for wrong in ({}, {"SLURM_SUBMIT_DIR": "/usr"}, {"TOOLKIT_HOME": "/usr"}):
        done = run(**wrong)
        assert done.returncode == 2
        assert "set TOOLKIT_HOME" in done.stderr


def wait_for(holds, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer


def running(mark):
    """Return the processes with some word in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "cmdline").read_bytes().decode().split("\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def start(project, program):
    return subprocess.Popen(
        ["bash", project / "jobs/own/job.sh"],
        env=os.environ | {"PROGRAM": program},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # Below nohup it is ignored, and no shell can trap what it was started to ignore.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_program_which_may_end_in_its_own_time(project, number):
    # Not `sleep 60 & wait`: a signal that comes as bash begins to wait is heard when that is over,
    # or, SIGINT, never.
    program = f"trap 'sleep 0.2; echo saved; exit 5' {number.value}; echo up;"
    process = start(project, program + " for ((i=0; i<600; i++)); do sleep 0.1; done")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "saved\n"
    assert process.returncode == 5


def test_a_warning_signal_is_passed_on_and_the_job_goes_on(project):
    # However late the signals come.
    program = "trap 'echo warned; i=590' USR1; i=0; echo up;"
    program += " while [ $i -lt 600 ]; do sleep 0.1; i=$((i+1)); done; exit 3"
    process = start(project, program)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    assert "warned" in process.communicate(timeout=90)[0]
    assert process.returncode == 3


def test_nothing_is_left_of_the_program(project):
    mark = f"98765.{os.getpid()}"
    process = start(project, f"(trap '' TERM HUP; sleep {mark}) & echo up; sleep 60 & wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    assert wait_for(lambda: running(mark))
    process.terminate()
    process.wait(timeout=60)
    wait_for(lambda: not running(mark))
    assert process.returncode == 128 + signal.SIGTERM
    assert not list((project.parent / "scratch").iterdir())


def test_a_program_that_does_not_end_is_killed_by_the_second_signal(project):
    process = start(project, "trap 'echo asked' TERM; echo up; while :; do sleep 0.2; done")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.terminate()
    # Two signals that the job has not yet taken are one.
    assert process.stdout.readline() == "asked\n"
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGKILL


def test_the_bundled_checks_are_what_the_images_run(project):
    script(project, "pytorch_check", TOOLKIT_DRY_RUN="1")
    with pytest.raises(UsageError, match="no image"):
        jobs.container_command(
            jobs.load("monai_check"), planned("local", job="monai_check", image="/none.sif")
        )
