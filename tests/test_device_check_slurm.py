"""The device check on a real Slurm of three nodes: as a job, as its health check, as a prolog."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster

from toolkit import paths, processes

sys.path.insert(0, str(Path(__file__).parent / "checks"))
import trees

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = """\
HealthCheckProgram={folder}/health
HealthCheckInterval=1
HealthCheckNodeState=ANY
Prolog={folder}/prolog
PrologFlags=Alloc
"""


@pytest.fixture(scope="module")
def nodes():
    """Three nodes for the job, which leaves them as they are."""
    slurm_cluster.require()
    with slurm_cluster.cluster(nodes=3) as running:
        yield running


@pytest.fixture
def drainable():
    """Three nodes of the test's own: Slurm takes long to trust one again that was drained."""
    slurm_cluster.require()
    with slurm_cluster.cluster(nodes=3, settings=SETTINGS) as running:
        for name in ("health", "prolog"):
            install(running, name, "exit 0")
        yield running


def install(slurm, name, text):
    """Replace a program in one step, as it may be started at any time."""
    new = slurm.folder / f"{name}.new"
    new.write_text(f"#!/bin/bash\n{text}\n")
    new.chmod(0o755)
    new.replace(slurm.folder / name)


@pytest.fixture
def project(tmp_path):
    """A project without an image; the nodes see it."""
    home = tmp_path / "project"
    shutil.copytree(paths.jobs(), home / "jobs")
    (home / ".venv/bin").mkdir(parents=True)
    searched = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    python = home / ".venv/bin/python"
    # Whichever Python runs the tests; -I would keep the tests' own path from it.
    python.write_text(
        f'#!/bin/bash\n[ "$1" != -I ] || shift\nPYTHONPATH={searched} exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return home


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Recorded hosts: all well, and one that lost a GPU."""
    folder = tmp_path_factory.mktemp("trees")
    for node in ("n1", "n2"):
        trees.amd_tree(folder / node, trees.mi300x())
    lost = trees.without_node(trees.mi300x(), 3)
    trees.amd_tree(folder / "n3", lost)
    return folder


def options(tree):
    return f"--rocm --expect 8 --root {tree}/%n"


def check(slurm, project, *arguments, **environment):
    """Run the job to its end; return its exit status, what it printed, and its report."""
    log = project / "job.log"
    done = slurm.run(
        "sbatch", "--parsable", f"--output={log}", *arguments,
        project / "jobs/device_check/job.sh", environment=environment, cwd=project,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    facts = slurm.finish(done.stdout.strip())
    text = log.read_text()
    folder = results(text)
    report = folder / "report.json" if folder else None
    merged = json.loads(report.read_text()) if report and report.exists() else None
    return int(facts["ExitCode"].partition(":")[0]), text, merged


def results(text):
    """Return the folder that the job's output names."""
    found = re.search(r"^results in (.*)$", text, re.M)
    return Path(found[1]) if found else None


def by_node(merged):
    return {node["node"]: node for node in merged["nodes"]}


# As a job


def test_every_node_reports_and_the_odd_one_is_named(nodes, project, tree):
    code, text, merged = check(nodes, project, "-N3", DEVICE_CHECK_OPTIONS=options(tree))
    assert code == 1, text
    assert re.search(r"^3 nodes: 1 failed \(n3\)", text, re.M), text
    found = by_node(merged)
    assert [found[n]["status"] for n in ("n1", "n2", "n3")] == ["pass", "pass", "fail"]
    assert (found["n3"]["devices"], found["n1"]["devices"]) == (7, 8)
    assert "devices" in found["n3"]["odd"]
    assert not found["n1"]["odd"]
    assert "no image build/monai.sif: only the hosts are checked" in text
    folder = results(text)
    assert sorted(p.name for p in folder.glob("*.json")) == [
        "n1.json", "n2.json", "n3.json", "report.json",
    ]  # fmt: skip
    assert not list(folder.glob("*.part"))
    assert json.loads((folder / "n3.json").read_text())["status"] == "fail"


def test_all_is_well(nodes, project, tree):
    well = f"--rocm --expect 8 --root {tree}/n1"
    code, text, merged = check(nodes, project, "-N2", DEVICE_CHECK_OPTIONS=well)
    assert code == 0, text
    assert "2 nodes: all is well, and alike" in text
    assert merged["status"] == "pass"


def test_a_node_that_does_not_report_is_a_failure_with_its_name(nodes, project, tree):
    python = project / ".venv/bin/python"
    program = python.read_text().replace(
        "#!/bin/bash\n",
        '#!/bin/bash\ncase "$SLURMD_NODENAME $*" in\n'
        '"n2 "*check\\ --json*) echo "error: broken" >&2; exit 7 ;;\n'
        '"n3 "*check\\ --json*) sleep 600 ;;\nesac\n',
    )
    python.write_text(program)
    code, text, merged = check(
        nodes, project, "-N3", "--nodelist=n1,n2,n3",
        DEVICE_CHECK_OPTIONS=f"--rocm --root {tree}/n1", DEVICE_CHECK_SECONDS="20",
    )  # fmt: skip
    assert code == 1
    assert "3 nodes: 2 did not report (n2, n3)" in text, text
    found = by_node(merged)
    assert "exit status 7" in found["n2"]["verdict"]
    assert "did not end within 20 s" in found["n3"]["verdict"]
    assert found["n1"]["status"] == "pass"


def test_the_step_has_all_gpus_of_the_node(nodes, project):
    python = project / ".venv/bin/python"
    program = python.read_text().replace(
        "PYTHONPATH", '[[ "$*" != *--json* ]] || env >"$RESULTS/n2.env"\nPYTHONPATH'
    )
    python.write_text(program)
    code, text, _ = check(nodes, project, "-wn2", DEVICE_CHECK_OPTIONS="--cpu")
    assert code == 0, text
    shown = (results(text) / "n2.env").read_text()
    assert "SLURM_GPUS_ON_NODE=2" in shown


def test_without_a_venv(nodes, project):
    shutil.rmtree(project / ".venv")
    code, text, _ = check(nodes, project)
    assert code == 2
    assert f"error: no {project}/.venv" in text
    assert "make venv" in text
    assert not list(project.glob("device_check-*"))


def test_submit(nodes, project, tree):
    done = nodes.run(
        sys.executable, "-m", "toolkit", "submit", "device_check", "--site", "local", "--",
        "--nodes=3", "--wait",
        environment={"TOOLKIT_HOME": str(project), "DEVICE_CHECK_OPTIONS": options(tree),
                     "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}, cwd=project,
    )  # fmt: skip
    assert done.code == 1
    log = next(project.glob("slurm-*.out")).read_text()
    assert "3 nodes: 1 failed (n3)" in log


def test_dry_run_of_submit(nodes, project):
    done = nodes.run(
        sys.executable, "-m", "toolkit", "submit", "device_check", "--site", "local", "--dry-run",
        environment={"TOOLKIT_HOME": str(project),
                     "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}, cwd=project,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert "jobs/device_check/node.sh" in done.stdout


def test_without_slurm(project, tree, tmp_path):
    for name, code in (("n1", 0), ("n3", 1)):
        done = processes.run(
            ["bash", project / "jobs/device_check/job.sh"],
            environment={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path),
                         "TOOLKIT_HOME": str(project),
                         "DEVICE_CHECK_OPTIONS": f"--rocm --expect 8 --root {tree}/{name}"},
            cwd=tmp_path,
        )  # fmt: skip
        assert done.code == code, done.stderr
        assert re.search(r"^1 node: (all is well|1 failed)", done.stdout, re.M)
    assert len(list(tmp_path.glob("device_check-*/report.json"))) == 2


# As Slurm's health check and prolog


def node(slurm, name):
    """Return the state of a node and the reason that is given for it."""
    done = slurm.run("scontrol", "--oneliner", "show", "node", name)
    state = re.search(r" State=(\S+)", done.stdout)
    reason = re.search(r" Reason=(.*?) \[", done.stdout)
    return state[1] if state else "", reason[1] if reason else ""


def wait_for(holds, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return answer


def health(slurm, project, tree, **settings):
    """Return a site's own lines around the script, which Slurm gives no environment."""
    told = {"SLURM_CONF": slurm.environment["SLURM_CONF"],
            "HEALTH_CHECK_OPTIONS": f"--rocm --expect 8 --root {tree}/$SLURMD_NODENAME",
            "HEALTH_CHECK_LOG": f"{project}/health.log"} | settings  # fmt: skip
    lines = [f'export {name}="{value}"' for name, value in told.items()]
    return "\n".join([*lines, f"exec {project}/jobs/device_check/health.sh"])


def test_health_check_drains_the_node_that_fails(drainable, project, tree):
    install(drainable, "health", health(drainable, project, tree))
    wait_for(lambda: "DRAIN" in node(drainable, "n3")[0])
    reason = node(drainable, "n3")[1]
    assert reason.startswith("toolkit check: node1, rocm: "), reason
    assert "failed" in reason
    assert reason in drainable.run("sinfo", "--noheader", "-R", "--format=%200E|%n").stdout
    log = project / "health.log"
    wait_for(lambda: all(f" {n}: OK" in log.read_text() for n in ("n1", "n2")))
    assert [node(drainable, n)[0] for n in ("n1", "n2")] == ["IDLE", "IDLE"]


def test_health_check_keeps_the_reason_that_is_there(drainable, project, tree):
    drainable.run("scontrol", "update", "nodename=n3", "state=drain", "reason=a new fan")
    install(drainable, "health", health(drainable, project, tree))
    log = project / "health.log"
    wait_for(lambda: log.exists() and log.read_text().count(" n3: CRITICAL") > 1)
    assert node(drainable, "n3")[1] == "a new fan"


def test_health_check_that_cannot_tell_leaves_the_node(drainable, project, tree):
    install(drainable, "health", health(drainable, project, tree, TOOLKIT_HOME="/nowhere"))
    log = project / "health.log"
    wait_for(lambda: log.exists() and log.read_text().count(" n3: UNKNOWN") > 1)
    assert "make venv" in log.read_text()
    assert node(drainable, "n3")[0] == "IDLE"


def test_prolog_drains_the_node_and_the_job_waits_for_another(drainable, project, tree):
    install(drainable, "prolog", health(drainable, project, tree))
    done = drainable.run(
        "sbatch", "--parsable", "--nodelist=n3", "--wrap=true", "--output=/dev/null"
    )
    job = done.stdout.strip()
    wait_for(lambda: "DRAIN" in node(drainable, "n3")[0])
    wait_for(lambda: drainable.show(job)["JobState"] == "PENDING")
    assert drainable.show(job)["Restarts"] == "1"
    assert node(drainable, "n3")[1].startswith("toolkit check: ")
    ran = drainable.run("srun", "--nodelist=n1", "true")
    assert ran.code == 0, ran.stderr
    # Whether or not what has just run there is quite over.
    state = set(node(drainable, "n1")[0].split("+"))
    assert state <= {"IDLE", "COMPLETING", "ALLOCATED", "MIXED"}


def test_prolog_that_cannot_tell_lets_the_job_run(drainable, project, tree):
    install(drainable, "prolog", health(drainable, project, tree, TOOLKIT_HOME="/nowhere"))
    ran = drainable.run("srun", "--nodelist=n3", "true")
    assert ran.code == 0, ran.stderr
    assert "UNKNOWN" in (project / "health.log").read_text()


# The script by itself


@pytest.fixture
def script(project, tmp_path):
    """Run it beside a stand-in for scontrol that notes how it was called."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin/scontrol"
    stand_in.write_text(
        f'#!/bin/bash\n[ "$2" != show ] || {{ echo "NodeName=n1 State=IDLE "; exit; }}\n'
        f'printf "%s\\n" "$@" >{tmp_path}/called\n'
    )
    stand_in.chmod(0o755)

    def run(answer, status, **environment):
        (project / ".venv/bin/python").write_text(
            f"#!/bin/bash\ncat {tmp_path}/answer\nexit {status}\n"
        )
        (tmp_path / "answer").write_text(answer)
        called = tmp_path / "called"
        called.unlink(missing_ok=True)
        done = processes.run(
            [project / "jobs/device_check/health.sh"],
            environment={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURMD_NODENAME": "n1",
                         "HEALTH_CHECK_LOG": str(tmp_path / "log"), **environment},
        )  # fmt: skip
        return done.code, called.read_text().splitlines() if called.exists() else []

    return run


def test_the_reason_is_clean_and_short(script):
    code, called = script(f'CRITICAL - n1: "it\'s" `bad` \\\tü {"x" * 500}\nmore\n', 2)
    assert code == 2
    assert called[:3] == ["update", "nodename=n1", "state=drain"]
    assert called[3].startswith("reason=toolkit check: n1: its bad ")
    assert re.fullmatch(r"[ -~]{100,240}", called[3])
    assert not set("\"'`\\") & set(called[3])


@pytest.mark.parametrize(
    ("answer", "status", "expected"),
    [
        ("OK - n1: all is well\n", 0, 0),
        ("WARNING - n1: works\n", 1, 0),
        ("UNKNOWN - n1: nothing\n", 3, 3),
        ("Traceback\n", 1, 3),
        ("error: no such option\n", 2, 3),
        ("", 127, 3),
    ],
)
def test_nothing_but_a_failed_check_drains(script, answer, status, expected):
    assert script(answer, status) == (expected, [])
    assert script(answer, status, SLURM_JOB_ID="1") == (0, [])
