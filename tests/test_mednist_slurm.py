"""MedNIST on the real Slurm: queued again it goes on, and two processes learn as one."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster

from toolkit import apptainer, paths

pytestmark = [pytest.mark.slurm, pytest.mark.image]

#: 192 images to train: six steps an epoch, at the seed's learning rate.
IMAGES, OPTIONS = 240, ["--epochs", "2", "--batch", "32"]
#: Nats between the losses of a step: 0.0004 at most were measured, in the twelfth. Sums in
#: another order are all that differs, and Adam enlarges it from step to step.
TOLERANCE = 0.002


def wait_for(holds: Callable[[], Any], seconds: float = 480.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return answer


@pytest.fixture(scope="module")
def runs(monai_sif: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One process that is ended in the middle and queued again; and two processes, unbroken."""
    slurm_cluster.require()
    folder = tmp_path_factory.mktemp("mednist")
    made = apptainer.execute(
        monai_sif,
        ["python3", "/tests/mednist_maker.py", "/work", str(IMAGES)],
        binds=[f"{paths.home() / 'tests'}:/tests:ro", f"{folder}:/work"],
    )
    assert made.code == 0, made.stderr
    archive = folder / "MedNIST.tar.gz"
    program = str(apptainer.find().path)
    with slurm_cluster.cluster(nodes=2) as slurm:

        def submit(name: str, *words: str | Path, **environment: str) -> str:
            done = slurm.run(
                "sbatch", "--parsable", "--gres=none", *words, *OPTIONS,
                environment={
                    "IMAGE": str(monai_sif), "TOOLKIT_APPTAINER": program,
                    "RESULTS": str(folder / name), "TOOLKIT_SCRATCH": str(folder),
                    "TOOLKIT_CACHE": "none",
                    # Two processes of two threads each on two CPUs wait for each other: five times
                    # slower.
                    "OMP_NUM_THREADS": "1", **environment,
                },
                cwd=folder,
            )  # fmt: skip
            assert done.code == 0, done.stderr
            return str(done.stdout.strip())

        def log(job: str) -> str:
            path = folder / f"slurm-{job}.out"
            return path.read_text() if path.exists() else ""

        job = submit("one", paths.jobs() / "mednist/job.sh", MEDNIST_DATA=str(archive))
        # Early: a busy machine may be late to pass the signal on.
        wait_for(lambda: re.search(r"^first step after\b", log(job), re.M))
        slurm.run("scancel", "--batch", "--signal=USR1", job)
        slurm.start_again(job)
        first = slurm.finish(job), log(job)
        job = submit(
            "two", "--nodes=2", paths.jobs() / "distributed/job.sh",
            paths.jobs() / "mednist/train.py", "--data", f"/input/{archive.name}",
            "--results", "/results", "--cache", "/tmp/mednist",
            INPUT=str(archive), PROCESSES="1",
        )  # fmt: skip
        second = slurm.finish(job), log(job)
        yield {"folder": folder, "one": first, "two": second}


def metrics(runs: dict[str, Any], name: str) -> dict[str, Any]:
    facts, log = runs[name]
    assert facts["JobState"] == "COMPLETED", log
    found: dict[str, Any] = json.loads((runs["folder"] / name / "metrics.json").read_text())
    return found


def test_a_training_that_is_queued_again_goes_on(runs: dict[str, Any]) -> None:
    _, log = runs["one"]
    assert re.findall(r"^(\w+): results in ", log, re.M) == ["requeued", "completed"], log
    found = metrics(runs, "one")
    assert found["runs"] == 2
    assert len(found["losses"]) == 12
    assert (runs["folder"] / "one/report.html").exists()


def test_two_processes_on_two_nodes_learn_as_one(runs: dict[str, Any]) -> None:
    one, two = metrics(runs, "one"), metrics(runs, "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    furthest = max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True))
    assert furthest < TOLERANCE, (one["losses"], two["losses"])
    assert one["losses"][-1] < one["losses"][0] - 0.1
