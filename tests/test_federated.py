"""Federations on the real image: the engine with its faults, the job, the parts by hand."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from images import inside, run_toolkit, seen_inside
from test_mednist import Page

from toolkit import apptainer, paths, processes

pytestmark = pytest.mark.image

#: Of the experiments in federated_inside.py.
PATIENCE = 15.0


@pytest.fixture(scope="module")
def openfl_sif(monai_sif: Path) -> Path:
    done = run_toolkit("build", "openfl")
    assert done.code == 0, done.stderr
    return Path(done.stdout.splitlines()[0])


# The engine


@pytest.fixture(scope="module")
def found(openfl_sif: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/federated_inside.py saw: all scenarios at once, since they mostly wait."""
    seen: dict[str, Any] = seen_inside(
        openfl_sif, "federated_inside.py", tmp_path_factory.mktemp("scenarios")
    )
    return seen


def told(scene: dict[str, Any], kind: str) -> list[tuple[int, str]]:
    return [(number, envoy) for k, number, envoy, _ in scene["told"] if k == kind]


def test_the_last_aggregate_is_the_mean_of_the_weights(found: dict[str, Any]) -> None:
    whole = found["whole"]
    # 1 plus round by round 5/3 times its number, as envoy 2 has twice the images of envoy 1.
    assert whole["last"] == [3, pytest.approx([11.0] * 6, rel=1e-6), 11]
    assert whole["best"] == [2, pytest.approx([6.0] * 6, rel=1e-6), 6]
    assert sorted(told(whole, "aggregated")) == [(1, ""), (2, ""), (3, "")]
    assert [n for n, _ in told(whole, "scored")] == [0, 1, 2, 3]
    assert set(told(whole, "averaged")) == {(n, f"envoy-{k}") for n in (1, 2, 3) for k in (1, 2)}
    # The parties end by themselves; the director is the driver's to end.
    assert whole["still"] == ["director"]


def test_the_last_aggregate_is_given_whole_while_a_round_ends(found: dict[str, Any]) -> None:
    assert found["kept whole"] == [[], ["a", "round"], ["a", "round"]]


def test_a_task_that_raises_ends_the_experiment_with_its_words(found: dict[str, Any]) -> None:
    scene = found["raising"]
    assert scene["error"] == "envoy-2: ValueError: no such label"
    assert scene["still"] == ["director"]


@pytest.mark.parametrize("name", ["killed", "stopped"])
def test_an_envoy_that_is_gone_is_noticed(found: dict[str, Any], name: str) -> None:
    scene = found[name]
    assert re.fullmatch(r"envoy-2: no sign of it for \d+ s", scene["error"])
    assert scene["seconds"] < PATIENCE + 60


def test_one_that_may_be_lost_is(found: dict[str, Any]) -> None:
    scene = found["tolerated"]
    assert told(scene, "lost") == [(2, "envoy-2")]
    # Each measures 5 images, of the second aggregate and the last one that does but one envoy.
    assert [(n, v["samples"]) for k, n, _, v in scene["told"] if k == "scored"] == [
        (0, 10), (1, 5), (2, 5), (3, 5),
    ]  # fmt: skip
    # On fewer images than all none is the best.
    assert scene["best"] == [0]
    # 8/3 after the first round with both, then 2 and 3 more by envoy 1 alone.
    assert scene["last"] == [3, pytest.approx([8 / 3 + 5] * 6, rel=1e-6), 8]
    assert {e for n, e in told(scene, "averaged") if n > 1} == {"envoy-1"}


def test_one_that_is_started_again_rejoins(found: dict[str, Any]) -> None:
    scene = found["restarted"]
    assert told(scene, "back") == [(2, "envoy-2")]
    assert scene["last"] == found["whole"]["last"]


def test_after_one_that_has_ended_the_next_begins_at_once(found: dict[str, Any]) -> None:
    scene = found["again"]
    assert scene["before"] == ["experiment: withdrawn", "envoy-2: ValueError: not now"]
    assert "error" not in scene
    assert scene["last"] == found["whole"]["last"]
    # Nobody has waited for what was gone, nor gone on with it.
    assert scene["seconds"] < PATIENCE


def test_without_the_director_all_end(found: dict[str, Any]) -> None:
    scene = found["director_killed"]
    assert "the director is gone" in scene["error"]
    assert scene["seconds"] < 60
    assert scene["still"] == []


def test_a_full_disk_at_the_director_is_told(found: dict[str, Any]) -> None:
    assert (
        "the director: OSError: [Errno 28] No space left on device" in found["disk_full"]["error"]
    )


def test_a_port_that_is_taken_is_told(found: dict[str, Any]) -> None:
    scene = found["port_taken"]
    assert scene["free"] == [False, True]
    assert "Failed to bind" in scene["error"]
    assert re.search(r"error: the port \d+ is taken", scene["said"]["director-too"])


def test_strangers_are_refused_and_nobody_minds(found: dict[str, Any]) -> None:
    scene = found["strangers"]
    assert scene["codes"] == {
        "other-authority": 1, "expired": 1, "other-name": 1, "plaintext": 3, "submitter": 3,
    }  # fmt: skip
    assert "of another authority" in scene["said"]["other-authority"]
    assert "no connection to the director" in scene["said"]["expired"]
    assert "has expired on" in scene["expired"]
    assert "the certificate is of envoy-1, not of envoy-2" in scene["said"]["other-name"]
    assert "refused: UNAVAILABLE" in scene["said"]["plaintext"]
    assert "envoy-1 may not submit experiments" in scene["said"]["submitter"]
    assert scene["last"] == found["whole"]["last"]


# The job


@pytest.fixture(scope="module")
def data(openfl_sif: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    words = ["/tests/medmnist_maker.py", str(folder / "bloodmnist.npz"), "240", "60", "60"]
    done = inside(openfl_sif, *words, folder=folder)
    assert done.code == 0, done.stderr
    return folder


class Job:
    """The job, run without Slurm."""

    def __init__(self, image: Path, data: Path, folder: Path) -> None:
        self.folder = folder
        (folder / "scratch").mkdir(parents=True)
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TOOLKIT"))}
        self.environment = mine | {
            "IMAGE": str(image),
            "FEDERATED_DATA": str(data),
            "TOOLKIT_APPTAINER": str(apptainer.find().path),
            "TOOLKIT_SCRATCH": str(folder / "scratch"),
            "TOOLKIT_CACHE": "none",
            "RESULTS": str(folder / "results"),
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(paths.jobs() / "federated/job.sh"), *words],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str]:
        process = self.start(*words)
        out, _ = process.communicate(timeout=600)
        self.require_clean()
        return process.returncode, out

    def require_clean(self) -> None:
        """Nothing is left of it: no process, no key, nothing in scratch."""
        assert not list((self.folder / "scratch").iterdir())
        assert not list((self.folder / "results").rglob("key.pem"))
        assert not list((self.folder / "results").rglob("ca.pem"))
        # What was killed needs a moment to die.
        deadline = time.monotonic() + 20
        while (found := self.living()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert found == []

    def living(self) -> list[bytes]:
        """The command lines that name its scratch."""
        mark, found = str(self.folder / "scratch").encode(), []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = entry.read_bytes()
                if mark in words:
                    found.append(words)
        return found


@pytest.fixture(scope="module")
def make_job(
    openfl_sif: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Job]:
    return lambda: Job(openfl_sif, data, tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def whole(make_job: Callable[[], Job]) -> tuple[Job, str]:
    job = make_job()
    code, out = job.run("--envoys", "2", "--rounds", "3", "--split", "label-skew", "--record")
    assert code == 0, out
    return job, out


def test_the_job_saves_the_last_aggregate_and_the_best(
    whole: tuple[Job, str], openfl_sif: Path
) -> None:
    job, _ = whole
    results = job.folder / "results"
    done = inside(openfl_sif, "/tests/federated_check.py", str(results), folder=job.folder)
    assert done.code == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["last"] < 1e-6
    assert seen["best"] < 1e-6
    assert seen["before"] > 1e-4


def test_the_job_reports(whole: tuple[Job, str]) -> None:
    job, out = whole
    metrics = json.loads((job.folder / "results/metrics.json").read_text())
    assert [each["round"] for each in metrics["rounds"]] == [1, 2, 3]
    for each in metrics["rounds"]:
        assert set(each["envoys"]) == {"envoy-1", "envoy-2"}
        for envoy in each["envoys"].values():
            assert None not in envoy.values()
            assert envoy["compute_s"] > 0
        total = sum(e["validation_samples"] for e in each["envoys"].values())
        mean = sum(
            e["aggregated_accuracy"] * e["validation_samples"] for e in each["envoys"].values()
        )
        assert each["accuracy"] == pytest.approx(mean / total, abs=1e-6)
        assert total == metrics["data"]["validation"] == 60
    assert sum(e["samples"] for e in metrics["rounds"][0]["envoys"].values()) == 240
    accuracies = [each["accuracy"] for each in metrics["rounds"]]
    assert metrics["final"]["accuracy"] == accuracies[-1]
    assert metrics["final"]["best_accuracy"] == max(accuracies)
    assert metrics["final"]["best_round"] == 1 + accuracies.index(max(accuracies))
    assert set(metrics["baselines"]["alone"]) == {"envoy-1", "envoy-2"}
    assert metrics["baselines"]["together"]["samples"] == 240
    assert metrics["engine"] == {"name": "openfl", "version": "OpenFL 1.7.1"}
    page = Page()
    page.feed((job.folder / "results/report.html").read_text())
    assert page.loads == []
    assert "aggregated of 2 envoys" in out


def test_a_job_that_is_warned_goes_on_after_the_last_aggregate(
    whole: tuple[Job, str], make_job: Callable[[], Job], openfl_sif: Path
) -> None:
    job = make_job()
    # More rounds than are compared: not all of them may be over before the warning comes.
    words = ["--envoys", "2", "--rounds", "15", "--split", "label-skew", "--no-baselines"]
    words += ["--record"]
    process = job.start(*words)
    assert process.stdout
    for line in process.stdout:
        if line.startswith("round 1 of 15: aggregated"):
            process.send_signal(signal.SIGUSR1)
    assert process.wait() == 85
    job.require_clean()
    assert not (job.folder / "results/last.pt").exists()
    code, out = job.run(*words, "--rate", "0.5")
    assert code == 2
    assert "is of another experiment: rate 0.001, not 0.5" in out
    code, out = job.run(*words)
    assert code == 0, out
    assert re.search(r"^going on after round \d+$", out, re.M), out
    first = whole[0].folder / "results"
    done = inside(
        openfl_sif,
        *("/tests/federated_check.py", str(job.folder / "results"), str(first)),
        folder=job.folder.parent,
    )
    # The same rounds from the same weights, in the same order.
    assert json.loads(done.stdout)["others"] == [pytest.approx(0, abs=1e-5)], done.stderr


MODEL = """
import torch


class Moody(torch.nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.layer = torch.nn.Linear(channels * 784, classes)

    def forward(self, images):
        if self.training:
            raise ValueError("not today")
        return self.layer(images.flatten(1))
"""

#: What an envoy gets is not what the driver gets.
SHARDS = """
import os
import numpy


def fickle(path, *, rank, count, seed):
    with numpy.load(path) as held:
        parts = {p: (held[p + "_images"], held[p + "_labels"]) for p in ("train", "val", "test")}
    x, y = parts["train"]
    mark = 20 if rank == 1 and os.getcwd().endswith("envoy-2") else 0
    parts["train"] = x[rank::count][mark:], y[rank::count][mark:]
    return {**parts, "name": "bloodmnist"}
"""


def test_an_envoy_with_other_data_is_found(make_job: Callable[[], Job]) -> None:
    job = make_job()
    (job.folder / "mine.py").write_text(SHARDS)
    # With a network of the user's own, that would raise if it were trained.
    (job.folder / "other.py").write_text(MODEL)
    words = ["--split", "mine.py:fickle", "--model", "other.py:Moody"]
    code, out = job.run("--envoys", "2", "--rounds", "2", *words)
    assert code == 1, out
    assert "error: envoy-2 has other data than it should have" in out


# By hand


def inside_folder(image: Path, script: str, folder: Path) -> processes.Result:
    """Run a shell script in the image, which sees the jobs and a folder at its own place."""
    binds = [f"{paths.jobs()}:/toolkit/jobs:ro", f"{folder}:{folder}"]
    return apptainer.execute(image, ["bash", "-c", script], binds=binds)


@pytest.fixture(scope="module")
def sites(openfl_sif: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A director and two envoys, each as in a terminal of its own, with signed certificates."""
    folder = tmp_path_factory.mktemp("sites")
    # Below those that programs get by themselves, and two: the next is the experiment's.
    port = 20000 + os.getpid() % 6000 * 2
    running: dict[str, subprocess.Popen[str]] = {}

    def toolkit(*words: str) -> processes.Result:
        return processes.run(
            [sys.executable, "-m", "toolkit", "federated", *words],
            environment=environment,
            cwd=folder,
            timeout=400,
        )

    def start(name: str, *words: str) -> None:
        log = (folder / f"{name}.log").open("a")
        running[name] = subprocess.Popen(
            [sys.executable, "-m", "toolkit", "federated", *words],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            text=True,
        )

    def envoy(name: str, shard: str) -> None:
        words = ["envoy", name, "--director", f"localhost:{port}", "--certificates", name]
        words += ["--data", str(data / "bloodmnist.npz"), "--shard", shard, "--threads", "1"]
        start(name, *words, "--patience", "60")

    environment = os.environ | {"IMAGE": str(openfl_sif), "PYTHONPATH": str(paths.home())}
    assert toolkit("certify", "authority", "ca").code == 0
    asked = toolkit("certify", "request", "env-one", "env-one")
    signed = toolkit("certify", "sign", "env-one/request.pem", "--authority", "ca",
                     "--output", "env-one.pem")  # fmt: skip
    # By this the two sides know that nobody has come between.
    assert asked.stdout.split()[-1] == signed.stdout.split()[-1]
    # As of a variable that is not set: it must not be taken for no wish to compare.
    unset = toolkit("certify", "install", "env-one.pem", "env-one", "--fingerprint", "")
    assert unset.code != 0 and "not by nobody" in unset.stderr
    assert toolkit("certify", "install", "env-one.pem", "env-one").code == 0
    # The others in one container, for it takes a while to start one.
    certify = "python3 /toolkit/jobs/federated/run.py certify"
    steps = [
        f"{certify} request {name} {name} && {certify} sign {name}/request.pem --authority ca"
        f" --output {name}.pem --host localhost && {certify} install {name}.pem {name}"
        for name in ("director", "env-two", "experiment")
    ]
    done = inside_folder(openfl_sif, f"cd {folder} && {' && '.join(steps)}", folder)
    assert done.code == 0, done.stderr
    start("director", "director", "--certificates", "director", "--port", str(port))
    envoy("env-one", "1/2")
    envoy("env-two", "2/2")
    yield folder, port, environment, running, envoy
    for process in running.values():
        process.terminate()
    for process in running.values():
        process.wait(timeout=60)


def test_an_experiment_by_hand_with_an_envoy_that_is_started_again(sites: Any) -> None:
    folder, port, environment, running, envoy = sites
    log = folder / "experiment.log"
    words = ["experiment", "--director", f"localhost:{port}", "--certificates", "experiment"]
    # Rounds enough for the envoy to be killed before they are over, and time for it to start.
    words += ["--results", "out", "--envoys", "2", "--rounds", "10", "--epochs", "3"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "toolkit", "federated", *words, "--patience", "300"],
            env=environment,
            cwd=folder,
            stdout=stream,
            stderr=stream,
        )
    deadline = time.monotonic() + 400
    while "round 1 of 10" not in log.read_text():
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()
        time.sleep(0.1)
    for pid in processes.descendants(running["env-two"].pid):
        # It may have ended with the one before.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert running["env-two"].wait(timeout=60) != 0
    envoy("env-two", "2/2")
    assert process.wait(timeout=400) == 0, log.read_text()
    assert "env-two is back in round" in log.read_text()
    metrics = json.loads((folder / "out/metrics.json").read_text())
    assert [set(each["envoys"]) for each in metrics["rounds"]] == [{"env-one", "env-two"}] * 10
    assert (folder / "out/last.pt").exists()


def test_a_network_of_ones_own_in_an_experiment_that_is_ended_and_goes_on(sites: Any) -> None:
    folder, port, environment, _, _ = sites
    (folder / "mine.py").write_text(MODEL.replace("if self.training", "if images is None"))
    log = folder / "own.log"
    words = ["experiment", "--director", f"localhost:{port}", "--certificates", "experiment"]
    # Where the envoys were started, and not where they work.
    words += ["--results", "own", "--envoys", "2", "--model", "mine.py:Moody"]

    def start(*more: str) -> subprocess.Popen[bytes]:
        with log.open("a") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", "toolkit", "federated", *words, *more],
                env=environment,
                cwd=folder,
                stdout=stream,
                stderr=stream,
            )

    process, deadline = start("--rounds", "15"), time.monotonic() + 300
    while "round 1 of 15" not in log.read_text():
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=60) == 85, log.read_text()
    # At once, while the envoys still hear of the end.
    process = start("--rounds", "16", "--resume")
    assert process.wait(timeout=400) == 0, log.read_text()
    assert re.search(r"^going on after round \d+$", log.read_text(), re.M)


def test_the_notebook_runs_against_the_same_federation(sites: Any, openfl_sif: Path) -> None:
    folder, port, _, _, _ = sites
    (folder / "note").mkdir()
    program = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=400, kernel_name="python3").execute()
print("".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", [])))
"""
    done = apptainer.execute(
        openfl_sif,
        ["python3", "-c", program, "/toolkit/jobs/federated/workspace/PyTorch_MedMNIST_2D.ipynb"],
        binds=[f"{paths.jobs()}:/toolkit/jobs:ro", f"{folder}:{folder}"],
        environment=os.environ
        | {
            "APPTAINERENV_FEDERATED_DIRECTOR": f"localhost:{port}",
            "APPTAINERENV_FEDERATED_CERTIFICATES": str(folder / "experiment"),
            "APPTAINERENV_FEDERATED_ROUNDS": "2",
            "APPTAINERENV_FEDERATED_MODEL": str(folder / "note/last.pt"),
            "APPTAINERENV_JUPYTER_RUNTIME_DIR": str(folder / "note"),
            "APPTAINERENV_IPYTHONDIR": str(folder / "note"),
        },
    )
    assert done.code == 0, done.stderr + done.stdout
    assert f"saved {folder}/note/last.pt" in done.stdout
    assert re.search(r"env-one \d+ images of bloodmnist", done.stdout)
    assert (folder / "note/last.pt").stat().st_size > 100_000
