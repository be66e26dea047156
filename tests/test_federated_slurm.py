"""The job federated on a real Slurm of two nodes: envoys spread, a node lost, nothing left."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from test_federated import data, openfl_sif  # noqa: F401

from toolkit import apptainer, paths, processes

pytestmark = [pytest.mark.slurm, pytest.mark.image]


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    slurm_cluster.require()
    with slurm_cluster.cluster(nodes=2) as slurm:
        yield slurm


class Submitted:
    """A job in the queue."""

    def __init__(self, slurm: Any, folder: Path, image: Path, place: Path, *words: str) -> None:
        self.slurm, self.folder = slurm, folder
        (folder / "scratch").mkdir()
        done = slurm.run(
            *(sys.executable, "-m", "toolkit", "submit", "federated", "--site", "local"),
            *("--image", image, "--json", *words),
            environment={
                "PYTHONPATH": str(paths.home()), "FEDERATED_DATA": str(place),
                "TOOLKIT_APPTAINER": str(apptainer.find().path), "TOOLKIT_CACHE": "none",
                "TOOLKIT_SCRATCH": str(folder / "scratch"), "REQUEUE": "0",
            },
            cwd=folder,
        )  # fmt: skip
        assert done.code == 0, done.stderr
        self.number = json.loads(done.stdout)["job_id"]
        self.results = folder / f"results/federated-{self.number}"
        self.log = folder / f"slurm-{self.number}.out"

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, words: str, seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.said():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.2)

    def end(self) -> dict[str, str]:
        facts: dict[str, str] = self.slurm.finish(self.number)
        deadline = time.monotonic() + 60
        while (found := self.left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert found == [], self.said()
        return facts

    def left(self) -> list[str]:
        """What must not be left: keys, scratch, processes."""
        found = [str(p) for name in ("key.pem", ".federation") for p in self.results.rglob(name)]
        found += [str(path) for path in (self.folder / "scratch").iterdir()]
        mark = str(self.folder / "scratch").encode()
        # Not those of another federation, of a test that runs at the same time.
        for pid in processes.descendants(self.slurm.pid):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if mark in words or (b"federated/run.py" in words and b"--federation\0/fed" in words):
                found.append(words.decode(errors="replace"))
        return found


def test_envoys_are_spread_over_the_nodes(
    running: Any,
    openfl_sif: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    job = Submitted(
        running, tmp_path, openfl_sif, data,
        *("--envoys", "2", "--rounds", "2", "--dataset", "bloodmnist", "--no-baselines"),
        *("--", "--nodes=2", "--time=10"),
    )  # fmt: skip
    facts = job.end()
    said = job.said()
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), said
    assert set(re.findall(r"^envoy-\d on (n\d):", said, re.M)) == {"n1", "n2"}, said
    metrics = json.loads((job.results / "metrics.json").read_text())
    assert [set(each["envoys"]) for each in metrics["rounds"]] == [{"envoy-1", "envoy-2"}] * 2
    assert (job.results / "last.pt").exists()
    assert json.loads((job.results / "job.json").read_text())["state"] == "completed"
    assert os.listdir(job.results / "logs")
